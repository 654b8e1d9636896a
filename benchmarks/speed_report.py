"""Tables of what the benchmarks of operations, of a model's decode step and of its prefill have measured."""

import re
from typing import Any

Row = dict[str, Any]


def decode_headline(rows: list[Row]) -> str:
    """A sentence on the row with most tokens in all its sequences."""
    row = max((row for row in rows if row["case"] == row["shape"]), key=size_of)
    return (
        f"One attention layer of Llama-3.1-8B's shape, decoding {batch_of(row)} x {thousands(tokens_of(row))} tokens "
        f"on an {row['device']}: **{row['wall_us']['median']:.0f} µs instead of {best_dense(row):.0f} µs** with "
        f"{row['kept']:.1%} of the tokens attended, which hold {row['true_mass']:.0%} of the attention "
        "([how it was measured](#results))."
    )


def decode_attention(rows: list[Row]) -> tuple[str, list[str]]:
    """What is said of the table, and its lines."""
    about = (
        f"**One decode step of one layer**: bfloat16, p = {rows[0]['top_p']:g}, on caches that hold as many tokens "
        f"worth attending as are attended ({provenance(rows, 'decode_attention.json')}). Kernel time is CUPTI's, with "
        "a cold L2, from the query to the output; the floor is the time of reading codes and attended tokens once, at "
        "the bandwidth that a streaming pass reached in the same run. Wall time is a step of a jitted loop; RaBitQ's "
        "appends the token and quantizes besides. Quantizing is the lazy update's mean over an interval, as a share of "
        "the kernel time. The ratio is of wall times, to the faster dense attention. "
        "Beyond Top-p are the tokens that bins keep more than the definition does, relative to its number."
    )
    head = (
        "case", "attended", "beyond Top-p", "mass held", "kernels, µs", "share of floor", "quantizing", "RaBitQ, µs",
        "dense XLA, µs", "dense cuDNN, µs", "ratio",
    )  # fmt: skip
    lines = [
        (
            label(row),
            f"{row['kept']:.1%}",
            f"{row['overshoot']:.1%}",
            f"{row['true_mass']:.0%}",
            spread(row["kernel_us"]),
            f"{row['share_of_floor']:.0%}",
            f"{row['quantization']['share_of_step']:.1%}",
            f"{row['wall_us']['median']:.0f}",
            *(dense_wall(row, name) for name in ("xla", "cudnn")),
            f"{best_dense(row) / row['wall_us']['median']:.2f}",
        )
        for row in rows
    ]
    return about, table(head, lines)


def selections(rows: list[Row]) -> tuple[str, list[str]]:
    """What is said of the table of a decode step by debiased and certified selection, and its lines."""
    about = (
        "**A decode step of one layer by each selection**, on caches planted so that each attends to as many tokens, "
        f"beside plain selection in the same run ({provenance(rows, 'decode_attention_certified.json')}, and the file "
        "beside it). Unless a case says that logits are spread, planted tokens all point along the query, and end at a "
        "cliff: their errors have much in common, so that at a high p many heads go into certified selection's second "
        "round, which real ones seldom do."
    )
    head = (
        "case", "selection", "p", "attended", "mass held", "heads with a second round", "kernels, µs", "over plain",
        "wall, µs", "over plain", "faster dense, wall µs",
    )  # fmt: skip
    lines = []
    for row in sorted(rows, key=lambda row: (size_of(row), row["selection"] == "certified", row["top_p"])):
        over = {
            name: f"{row[name]['median'] / row['plain'][name]['median'] - 1:.0%}" for name in ("kernel_us", "wall_us")
        }
        lines.append(
            (
                label(row), row["selection"], f"{row['top_p']:g}", f"{row['kept']:.1%}", f"{row['true_mass']:.1%}",
                f"{row['extended']:.1%}", spread(row["kernel_us"]), over["kernel_us"],
                f"{row['wall_us']['median']:.0f}", over["wall_us"], f"{best_dense(row):.0f}",
            )
        )  # fmt: skip
    return about, table(head, lines)


def operation(rows: list[Row], name: str) -> tuple[str, list[str]]:
    """What is said of an operation's table, and its lines."""
    head = (
        "case", "implementation", "attended", "kernels, µs", "wall, µs", "floor, µs", "share of floor", "TB/s",
        "dense XLA, µs", "dense cuDNN, µs",
    )  # fmt: skip
    lines = [
        (
            label(row),
            row["implementation"],
            f"{row['kept']:.1%}",
            spread(row["kernel_us"]),
            f"{row['wall_us']['median']:.1f}",
            f"{row['floor_us']:.1f}",
            f"{row['share_of_floor']:.0%}",
            f"{row['tb_per_s']:.2f}",
            *(
                f"{row['dense'][name]['kernel_us']['median']:.0f}" if name in row["dense"] else "-"
                for name in ("xla", "cudnn")
            ),
        )
        for row in rows
    ]
    about = f"**`{name}`** ({provenance(rows, f'{name}.json', 'results')}); dense attention by its kernels:"
    return about, table(head, lines)


def decode_step(rows: list[Row]) -> tuple[str, list[str]]:
    """What is said of the table, and its lines."""
    about = (
        f"**A decode step of a whole model** with random weights, on planted caches "
        f"({provenance(rows, 'decode_step.json')}). The rest is the step without attention; its floor is reading the "
        "weights once. Busy is the time in which the device runs some kernel in a step of RaBitQ's, and launches are "
        "its kernels. Without graphs is the step with CUDA graphs switched off, if a profile shows that none was used."
    )
    head = (
        "case",
        "attended",
        "RaBitQ, ms",
        "share of floor",
        "dense, ms",
        "ratio",
        "rest, ms",
        "rest's share of floor",
        "busy, ms",
        "launches",
        "without graphs, ms",
    )
    lines = [
        (
            row["case"],
            f"{row['kept']:.1%}",
            f"{row['wall_us']['median'] / 1000:.2f}",
            f"{row['share_of_floor']:.0%}",
            f"{row['dense']['xla']['wall_us']['median'] / 1000:.2f}",
            f"{row['dense']['xla']['wall_us']['median'] / row['wall_us']['median']:.2f}",
            f"{row['rest']['wall_us']['median'] / 1000:.2f}",
            f"{row['rest']['share_of_floor']:.0%}",
            *device_facts(row),
        )
        for row in rows
    ]
    return about, table(head, lines)


def device_facts(row: Row) -> tuple[str, str, str]:
    """Busy milliseconds, launches, and milliseconds without CUDA graphs, where they are known."""
    if "timeline" not in row:
        return "-", "-", "-"
    bare = row["without_graphs"]
    without = f"{bare['wall_us']['median'] / 1000:.2f}" if bare.get("in_graphs") == 0 else "-"
    return f"{row['timeline']['busy_us'] / 1000:.2f}", f"{row['timeline']['launches']:.0f}", without


def prefill(rows: list[Row]) -> tuple[str, list[str]]:
    """What is said of the table, and its lines."""
    about = (
        f"**A prefill of that model** ({provenance(rows, 'prefill.json')}), against the rate of a large bfloat16 "
        "matrix product in the same run."
    )
    head = ("case", "seconds", "tokens/s", "TFLOP/s", "share of the product's rate", "making codes")
    lines = [
        (
            row["case"],
            f"{row['wall_us']['median'] / 1e6:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tflop_per_s']:.0f}",
            f"{row['share_of_matmul_rate']:.0%}",
            f"{row['codes_share']:.1%}",
        )
        for row in rows
    ]
    return about, table(head, lines)


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table; the first column is text."""
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]


def label(row: Row) -> str:
    """The case's name; of one that is named as its shape, what differs between the shapes."""
    if row["case"] != row["shape"]:
        return row["case"]
    batch, _, group, tokens, head_dim = (int(n) for n in re.findall(r"\d+", row["shape"]))
    varied = [f"G = {group}"] * (group != 4) + [f"D = {head_dim}"] * (head_dim != 128)
    return ", ".join([f"{batch} x {thousands(tokens)}", *varied])


def batch_of(row: Row) -> int:
    return int(re.findall(r"B(\d+)-", row["shape"])[0])


def tokens_of(row: Row) -> int:
    return int(re.findall(r"-T(\d+)-", row["shape"])[0])


def size_of(row: Row) -> tuple[int, int]:
    """Tokens of all sequences; among rows that are alike in it, more sequences are more."""
    return batch_of(row) * tokens_of(row), batch_of(row)


def best_dense(row: Row) -> float:
    """Wall time of the faster dense attention, in microseconds."""
    return min(times["wall_us"]["median"] for times in row["dense"].values())


def dense_wall(row: Row, name: str) -> str:
    return f"{row['dense'][name]['wall_us']['median']:.0f}" if name in row["dense"] else "-"


def spread(times: dict[str, float]) -> str:
    return f"{times['median']:.1f} ({times['low']:.1f} to {times['high']:.1f})"


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens < 1 << 20 else f"{tokens >> 20}M"


def provenance(rows: list[Row], name: str, folder: str = "benchmarks/results") -> str:
    """Device, versions, commit and commands of the rows; the file in a folder."""
    runs: dict[str, dict[str, None]] = {}
    for row in rows:
        where = f"{row['device']}, JAX {row['jax']}, commit {row['commit']}"
        runs.setdefault(where, {})[f"`{row['command']}`"] = None
    runs_and_commands = "; ".join(f"{where}, {', '.join(commands)}" for where, commands in runs.items())
    return f"{runs_and_commands}, [{name}]({folder}/{name})"
