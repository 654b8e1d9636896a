"""Pictures of results of `python -m benchmarks.quality`."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.quality.report import unique, way

HEAT_TOP_P = 0.95


def draw(content: dict[str, Any], folder: Path, name: str) -> None:
    """Write NAME-scores.png and, where there are other methods, NAME-methods.png, where attention was measured,
    NAME-heads.png and NAME-mass.png into a folder."""
    if any(row.get("method") for row in content["rows"]):
        save(draw_methods(content), folder / f"{name}-methods.png")
    save(draw_scores(content), folder / f"{name}-scores.png")
    save(draw_heads(content), folder / f"{name}-heads.png")
    if content["probes"]:
        save(draw_mass(content), folder / f"{name}-mass.png")


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scale_shares(axis: Any) -> None:
    """A logarithmic x axis of shares, in percent."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [share for share in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if low <= share <= high]
    axis.set_xticks(ticks, [f"{share:.1%}" if share < 0.01 else f"{share:.0%}" for share in ticks])
    axis.minorticks_off()


def draw_scores(content: dict[str, Any]) -> plt.Figure:
    """Score against the share of tokens attended: a panel a length, a line a task, a point for each p."""
    lengths = sorted({row["tokens"] for row in content["rows"]})
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(max(4.2 * len(lengths), 6.5), 4.4), layout="constrained", sharey=True, squeeze=False
    )
    for axis, tokens in zip(axes[0], lengths, strict=True):
        rows = [row for row in content["rows"] if row["tokens"] == tokens]
        for color, task in enumerate(unique(row["task"] for row in rows)):
            own = [row for row in rows if row["task"] == task]
            sparse = sorted((row for row in own if row["top_p"] is not None), key=lambda row: row["kept"])
            (dense,) = (row for row in own if way(row) == "dense")
            axis.plot(
                [row["kept"] for row in sparse], [row["score"] for row in sparse], "o-", color=f"C{color}", label=task
            )
            axis.axhline(dense["score"], color=f"C{color}", linewidth=0.8, linestyle=":")
        axis.set(title=f"{tokens:,} tokens", xlabel="share of tokens attended", ylim=(-0.03, 1.03))
        scale_shares(axis)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("score (dotted: dense)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def draw_methods(content: dict[str, Any]) -> plt.Figure:
    """The mean score of all tasks and, where it was measured, the attention captured, against the bytes read: a panel a
    length, a line a method."""
    lengths = sorted({row["tokens"] for row in content["rows"]})
    answers = [probe for probe in content["probes"] if probe["texts"] == "answers"]
    panels = [(content["rows"], "score", "score, mean over tasks")]
    panels += [(answers, "captured", "attention captured")] * bool(answers)
    figure, axes = plt.subplots(
        len(panels), len(lengths), figsize=(max(4.2 * len(lengths), 7), 1 + 3.9 * len(panels)), layout="constrained",
        sharey="row", squeeze=False,
    )  # fmt: skip
    # A method looks the same in all panels.
    styles = {method: _style(i, method) for i, method in enumerate(unique(map(method_name, content["rows"])))}
    for line, (rows, of, label) in zip(axes, panels, strict=True):
        for axis, tokens in zip(line, lengths, strict=True):
            _draw_curves(axis, [row for row in rows if row["tokens"] == tokens and row[of] is not None], of, styles)
            axis.set(title=f"{tokens:,} tokens", xlabel="share of bytes read", ylim=(-0.03, 1.03))
            scale_shares(axis)
            axis.grid(alpha=0.3)
        line[0].set_ylabel(label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _style(i: int, method: str) -> dict[str, Any]:
    color = "k" if method == "rabitq" else plt.get_cmap("tab20")(i % 20)
    return {"marker": "os^Dv"[i % 5], "color": color, "markersize": 5}


def _draw_curves(axis: Any, rows: list[dict], of: str, styles: dict[str, dict[str, Any]]) -> None:
    """A line a method, a point for each of its budgets: the mean over that budget's rows."""
    points: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        points.setdefault(method_name(row), {}).setdefault(way(row), []).append(row)
    for method, ways in points.items():
        means = [[np.mean([row[name] for row in own]) for name in ("bytes_read", of)] for own in ways.values()]
        axis.plot(*zip(*sorted(means), strict=True), label=method, **styles[method])


def method_name(row: dict[str, Any]) -> str:
    """The method that a row is of, whatever its budget."""
    if row.get("method"):
        return row["method"].partition(":")[0]
    return "dense" if row["top_p"] is None else "rabitq"


def draw_heads(content: dict[str, Any]) -> plt.Figure:
    """Share of tokens that each layer and kv head attends: a panel a task, at the longest prompts."""
    tokens = max(row["tokens"] for row in content["rows"])
    top_p = min(unique(row["top_p"] for row in content["rows"] if row["top_p"]), key=lambda p: abs(p - HEAT_TOP_P))
    rows = [row for row in content["rows"] if row["tokens"] == tokens and row["top_p"] == top_p]
    figure, axes = plt.subplots(1, len(rows), figsize=(1.9 * len(rows) + 1, 3.4), layout="constrained", squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        kept = np.array(row["kept_by_head"])
        image = axis.imshow(np.log10(kept.clip(1e-4)), vmin=-3, vmax=0, cmap="viridis", aspect="auto")
        for (layer, head), value in np.ndenumerate(kept):
            axis.text(
                head, layer, f"{value:.1%}", ha="center", va="center", fontsize=7, color="w" if value < 0.3 else "k"
            )
        axis.set(title=row["task"], xlabel="kv head", xticks=range(kept.shape[1]), yticks=range(kept.shape[0]))
        axis.title.set_fontsize(8)
    axes[0][0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes[0].tolist(), ticks=[-3, -2, -1, 0])
    bar.ax.set_yticklabels(["0.1%", "1%", "10%", "100%"])
    figure.suptitle(f"Tokens attended, {tokens:,} tokens, p = {top_p:g}", fontsize=10)
    return figure


def draw_mass(content: dict[str, Any]) -> plt.Figure:
    """Attention mass against the p that was asked for: claimed, captured, and captured by each query head."""
    probes = [probe for probe in content["probes"] if probe["texts"] == "answers" and probe["top_p"] is not None]
    lengths = sorted({probe["tokens"] for probe in probes})
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(4.2 * len(lengths), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axis, tokens in zip(axes[0], lengths, strict=True):
        rows = sorted((probe for probe in probes if probe["tokens"] == tokens), key=lambda probe: probe["top_p"])
        asked = [row["top_p"] for row in rows]
        for row in rows:
            coded = [
                heads
                for heads, errors in zip(row["captured_by_head"], row["error_nats_by_head"], strict=True)
                if max(errors) > 0
            ]
            captured = np.ravel(coded)
            axis.plot(np.full(captured.size, row["top_p"]), captured, ".", color="C1", alpha=0.35, markersize=4)
        axis.plot(asked, [row["claimed"] for row in rows], "s--", color="C0", label="claimed by the estimate")
        axis.plot(asked, [row["captured"] for row in rows], "o-", color="C1", label="captured (points: query heads)")
        axis.plot([min(asked), 1], [min(asked), 1], color="k", linewidth=0.6, linestyle=":", label="asked for")
        axis.set(title=f"{tokens:,} tokens", xlabel="p")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the attention")
    axes[0][0].legend(fontsize=8)
    return figure


def draw_training(content: dict[str, Any]) -> plt.Figure:
    """Losses and the share of answer tokens that are right, over the steps, with the lengths of the sequences."""
    history = content["history"]
    steps = [entry["step"] for entry in history]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.semilogy(steps, [entry["answers"] for entry in history], color="C0", label="answers, nats a byte")
    axis.semilogy(steps, [entry["text"] for entry in history], color="C1", label="text, nats a byte")
    axis.semilogy(steps, [1 - entry["right"] for entry in history], color="C2", label="share of answer bytes wrong")
    begin = 0
    for stage in content["stages"]:
        axis.axvline(begin, color="k", linewidth=0.6, linestyle=":")
        axis.annotate(
            f"{stage['tokens']:,} tokens", (begin, 1), xycoords=("data", "axes fraction"),
            xytext=(3, -10), textcoords="offset points", fontsize=8, in_layout=False,
        )  # fmt: skip
        begin += stage["steps"]
    axis.set(xlabel="step")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
