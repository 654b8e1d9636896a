"""Tables of the measurements of quality, in Markdown."""

from typing import Any

import numpy as np

SWEEP_MEASURES = ("exact", "divergence", "captured", "error_nats")


def table(content: dict[str, Any]) -> str:
    """One table a length: a line a way of decoding, a column a task, then what was read and captured."""
    return "\n\n".join(length_table(content, tokens) for tokens in sorted({row["tokens"] for row in content["rows"]}))


def about_training(training: dict[str, Any]) -> str:
    """Where the retrieval model comes from."""
    last, stages = training["history"][-1], training["stages"]
    lengths = ", ".join(f"{stage['tokens']:,}" for stage in stages)
    return (
        f"The model has {training['parameters'] / 1e6:.1f} million parameters and was trained from scratch in "
        f"{last['seconds'] / 60:.0f} minutes ({last['step']:,} steps on texts of {lengths} bytes) on an "
        f"{training['environment']['device']}, with `python -m benchmarks.quality.train`. In its last steps "
        f"{last['right']:.1%} of the answers' bytes were right."
    )


def length_table(content: dict[str, Any], tokens: int) -> str:
    rows = [row for row in content["rows"] if row["tokens"] == tokens]
    tasks = unique(row["task"] for row in rows)
    probes = {(probe["texts"], way(probe)): probe for probe in content["probes"] if probe["tokens"] == tokens}
    head = ["decoding", *tasks, "tokens attended", "bytes read"]
    # Results of before there was verification do not have it.
    verifies = any(probe.get("verified") is not None for probe in probes.values())
    if probes:
        verified = ["mass verified"] if verifies else []
        head += ["mass claimed", *verified, "mass captured", "KL to dense, nats", "perplexity of text"]
    lines = [f"**Prompts of {tokens:,} tokens**", "", cells(head), cells(["---", *["---:"] * (len(head) - 1)])]
    for name in unique(way(row) for row in rows):
        own = {row["task"]: row for row in rows if way(row) == name}
        mean = {field: sum(row[field] for row in own.values()) / len(own) for field in ("kept", "bytes_read")}
        line = [name]
        line += [score(own[task]) for task in tasks]
        line += [f"{mean['kept']:.1%}", f"{mean['bytes_read']:.1%}"]
        if probes:
            answers, text = probes["answers", name], probes["text", name]
            masses = ("claimed", *["verified"] * verifies, "captured")
            line += [share(answers.get(mass)) for mass in masses]
            line += [f"{answers['divergence']:.4f}", f"{text['perplexity']:.3f}"]
        lines.append(cells(line))
    return "\n".join(lines)


def way(row: dict[str, Any]) -> str:
    """The way of decoding that a row is of."""
    if row.get("method"):
        return f"`{row['method']}`"
    return "dense" if row["top_p"] is None else f"p = {row['top_p']:g}"


def sweep_table(content: dict[str, Any]) -> str:
    """A line a change: its measures at the bytes that the base reads at the middle p, interpolated along its own p; and
    a table of the selections, at bytes that all of them read at some p."""
    curves = {
        change: sorted((row for row in content["rows"] if row["change"] == change), key=lambda row: row["top_p"])
        for change in unique(row["change"] for row in content["rows"])
    }
    base = curves["base"]
    tables = [_table_at(base[len(base) // 2]["bytes_read"], curves, content["tokens"])]
    selections = {name: rows for name, rows in curves.items() if name == "base" or name.startswith("selection=")}
    least, most = (end(rows[i]["bytes_read"] for rows in selections.values()) for end, i in ((max, 0), (min, -1)))
    if len(selections) > 1 and least <= most:
        tables.append(_table_at((least + most) / 2, selections, content["tokens"]))
    return "\n\n".join(tables)


def _table_at(target: float, curves: dict[str, list[dict]], tokens: int) -> str:
    """Measures at `target` of the bytes of dense attention, of curves by rising p."""
    head = ["change", "p", "tokens attended", "answers exact", "KL to dense, nats", "mass captured"]
    lines = [
        f"At {target:.1%} of the bytes of dense attention, {tokens:,} tokens, answers of every task:",
        "",
        cells([*head, "error of logits, nats"]),
        cells(["---", *["---:"] * len(head)]),
    ]
    for change, rows in curves.items():
        bytes_read = [row["bytes_read"] for row in rows]
        if not bytes_read[0] <= target <= bytes_read[-1]:
            ends = f"{bytes_read[0]:.1%} to {bytes_read[-1]:.1%} of the bytes"
            lines.append(cells([f"`{change}`", ends, "", "", "", "", f"{rows[0]['error_nats']:.2f}"]))
            continue
        at = {
            name: float(np.interp(target, bytes_read, [row[name] for row in rows]))
            for name in ("top_p", "kept", *SWEEP_MEASURES)
        }
        line = [f"`{change}`", f"{at['top_p']:.3f}", f"{at['kept']:.1%}", f"{at['exact']:.1%}"]
        line += [f"{at['divergence']:.4f}", f"{at['captured']:.4f}", f"{at['error_nats']:.2f}"]
        lines.append(cells(line))
    return "\n".join(lines)


def score(row: dict[str, Any]) -> str:
    """A score in percent, with its 95 % interval."""
    low, high = row["interval"]
    return f"{100 * row['score']:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def cells(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def unique(values) -> list:
    return list(dict.fromkeys(values))
