"""Pictures of a decode step: time against the length of the context, time by stage, and the share of the floor."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.speed_report import Row, best_dense, label, thousands, tokens_of

# Names of kernels by what they begin with, or hold; other kernels prepare the query, or attend to sinks and window.
STAGES = {
    "scores": ("score_bins", "scores"),
    "selection": ("compact", "top_p"),
    "attention": ("gathered_attention", "combine_parts"),
}
REST = "query, sinks and window"


def draw(rows: list[Row], path: Path) -> None:
    """Draw the three from the rows of decode_attention.json."""
    rows = [row for row in rows if row["case"] == row["shape"]]
    figure, (times, stages, floors) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    draw_times(times, rows)
    draw_stages(stages, rows)
    draw_floors(floors, rows)
    figure.suptitle(rows[0]["device"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_times(axes: Any, rows: list[Row]) -> None:
    """Wall time of dense attention and of ours against the context, a colour a batch size, at the usual G and D."""
    rows = [row for row in rows if "-G4-" in row["shape"] and row["shape"].endswith("-D128")] or rows
    batches = sorted({row["shape"].split("-")[0] for row in rows})
    for color, batch in enumerate(batches):
        of_batch = sorted((row for row in rows if row["shape"].startswith(f"{batch}-")), key=tokens_of)
        tokens = [tokens_of(row) for row in of_batch]
        dense, ours = [best_dense(row) for row in of_batch], [row["wall_us"]["median"] for row in of_batch]
        axes.loglog(tokens, dense, "o--", color=f"C{color}", label=f"dense, batch {batch[1:]}")
        axes.loglog(tokens, ours, "o-", color=f"C{color}", label=f"RaBitQ, batch {batch[1:]}")
    ticks = sorted({tokens_of(row) for row in rows})
    axes.set_xticks(ticks, [thousands(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="tokens in the cache", ylabel="wall time, µs a layer and step")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_stages(axes: Any, rows: list[Row]) -> None:
    """Kernel time of each stage, stacked, a bar a case."""
    left = [0.0] * len(rows)
    by_row = [stage_times(row["kernels_us"]) for row in rows]
    for stage in (REST, *STAGES):
        times = [stages[stage] for stages in by_row]
        axes.barh([label(row) for row in rows], times, left=left, label=stage)
        left = [a + b for a, b in zip(left, times, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="kernel time, µs")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8)


def stage_times(kernels: dict[str, float]) -> dict[str, float]:
    """Microseconds of each stage, from those of each kernel."""
    times = dict.fromkeys((*STAGES, REST), 0.0)
    for name, microseconds in kernels.items():
        stage = next((stage for stage, parts in STAGES.items() if any(part in name for part in parts)), REST)
        times[stage] += microseconds
    return times


def draw_floors(axes: Any, rows: list[Row]) -> None:
    """The share of the byte floor that each case's kernels reach."""
    axes.barh([label(row) for row in rows], [100 * row["share_of_floor"] for row in rows], color="C4")
    axes.invert_yaxis()
    axes.set(xlabel="byte floor, % of the kernel time", xlim=(0, 100))
