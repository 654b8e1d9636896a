"""The table and the picture of `python -m benchmarks.certificate`."""

import math
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.quality.report import cells, unique

COLORS = {"plain": "C3", "debiased": "C0", "certified": "C2"}


def rows_of(content: dict[str, Any], heads: str, tail: str = "drop") -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["heads"] == heads and row["tail"] == tail]


def table(content: dict[str, Any]) -> str:
    """The model's lines, and under them one for each kind of hard heads at one p."""
    head = [
        "selection", "p", "mass captured", "head-steps below p", "mass verified", "shown to hold p", "second rounds",
        "tokens attended", "bytes read", "KL to dense, nats", "error of the output", "with the tail's mean",
    ]  # fmt: skip
    lines = [cells(head), cells(["---", *["---:"] * (len(head) - 1)])]
    tails = {(row["selection"], row["top_p"]): row for row in rows_of(content, "model", "mean")}
    for row in rows_of(content, "model"):
        with_tail = tails.get((row["selection"], row["top_p"]))
        lines.append(
            cells(
                [
                    row["selection"], f"{row['top_p']:g}", f"{row['captured']:.3f}", share(row["short"]),
                    *([f"{row['verified']:.3f}", f"{row['certified']:.1%}"] if "verified" in row else ["", ""]),
                    share(row["extended"]) if row["selection"] == "certified" else "", f"{row['kept']:.1%}",
                    f"{row['bytes_read']:.1%}", f"{row['divergence']:.1e}",
                    f"{row['output_error']:.1%}", f"{with_tail['output_error']:.1%}" if with_tail else "",
                ]
            )
        )  # fmt: skip
    return "\n".join(lines)


def hard_table(content: dict[str, Any], top_p: float) -> str:
    """A line a kind of hard heads: head-steps below p, and tokens attended, of each selection."""
    selections = list(COLORS)
    head = ["heads", "head-steps"]
    head += [f"{selection}: {what}" for selection in selections for what in ("below p", "attended")]
    lines = [cells(head), cells(["---", *["---:"] * (len(head) - 1)])]
    for kind in content["kinds"]:
        rows = {row["selection"]: row for row in rows_of(content, kind) if row["top_p"] == top_p}
        line = [kind, f"{rows['plain']['head_steps']:,}"]
        for selection in selections:
            line += [share(rows[selection]["short"]), f"{rows[selection]['kept']:.1%}"]
        lines.append(cells(line))
    return "\n".join(lines)


def share(value: float) -> str:
    """A share in percent, with more digits where it is small."""
    if value == 0:
        return "none"
    return f"{value:.1%}" if value >= 0.01 else f"{value:.3%}"


def draw(content: dict[str, Any]) -> plt.Figure:
    """Captured against asked for, and the tokens that it takes: the model's heads, and the hard ones in thin lines."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for selection, color in COLORS.items():
        for heads in unique(row["heads"] for row in content["rows"]):
            rows = [row for row in rows_of(content, heads) if row["selection"] == selection]
            asked = [logit(row["top_p"]) for row in rows]
            is_model = heads == "model"
            style = {"color": color, "linewidth": 2.2 if is_model else 0.7, "alpha": 1 if is_model else 0.5}
            label = selection if is_model else None
            axes[0].plot(asked, [logit(row["captured"]) for row in rows], "o-", markersize=4, label=label, **style)
            axes[1].plot(asked, [row["kept"] for row in rows], "o-", markersize=4, label=label, **style)
    ticks = unique(row["top_p"] for row in content["rows"])
    axes[0].plot([logit(t) for t in ticks], [logit(t) for t in ticks], "k:", linewidth=1, label="asked for")
    marks = (0.1, 0.25, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
    axes[0].set_yticks([logit(mark) for mark in marks], [f"{mark:g}" for mark in marks])
    axes[0].set(ylabel="true attention captured, mean over head-steps", title="Thick: the model; thin: hard heads")
    axes[1].set(ylabel="share of tokens attended", yscale="log")
    for axis in axes:
        axis.set_xticks([logit(t) for t in ticks], [f"{t:g}" for t in ticks])
        axis.set_xlabel("p asked for")
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def logit(share: float) -> float:
    """So that 0.9, 0.99 and 0.999 stand apart."""
    share = min(max(share, 1e-4), 1 - 1e-5)
    return math.log(share / (1 - share))
