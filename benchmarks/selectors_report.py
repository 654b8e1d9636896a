"""Tables and a picture that compare retrieval methods."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt

from benchmarks import speed_report
from benchmarks.methods import EACH
from benchmarks.quality.plots import method_name, scale_shares
from benchmarks.quality.report import cells, unique, way

WITHIN = (0.1, 0.2)
ENOUGH = 0.9
COLORS = plt.get_cmap("tab20")


def table(content: dict[str, Any]) -> str:
    """A line a method of `python -m benchmarks.selectors`, on planted answers of several kinds."""
    tasks = list(content["tasks"])

    def answers(name: str) -> list[str]:
        rows = [row for row in content["rows"] if row["name"] == name]
        return [best([row for row in rows if row["task"] == task], "right", WITHIN[0], "{:.0%}") for task in tasks]

    return _table(means(content), [f"right within {WITHIN[0]:.0%}, {task}" for task in tasks], answers)


def model_table(content: dict[str, Any]) -> str:
    """A line a method of `python -m benchmarks.quality --compare`, at one length: means over the tasks."""
    captured = {way(probe): probe["captured"] for probe in content["probes"] if probe["texts"] == "answers"}
    points = []
    for method in unique(map(way, content["rows"])):
        rows = [row for row in content["rows"] if way(row) == method]
        score, bytes_read = (sum(row[key] for row in rows) / len(rows) for key in ("score", "bytes_read"))
        point = {"name": method_name(rows[0]), "method": method, "captured": captured[method]}
        points.append({**point, "score": score, "bytes_read": bytes_read})

    def scores(name: str) -> list[str]:
        return [best([point for point in points if point["name"] == name], "score", s, "{:.0%}") for s in WITHIN]

    return _table(points, [f"score within {share:.0%}" for share in WITHIN], scores)


def _table(points: list[dict[str, Any]], head: list[str], answers: Callable[[str], list[str]]) -> str:
    """A line a method: the best of its points within shares of the bytes, its answers, and the cheapest point that
    captures enough."""
    head = [*[f"mass captured within {share:.0%} of the bytes" for share in WITHIN], *head]
    head += [f"bytes to capture {ENOUGH:.0%}", "points on the front"]
    lines = [cells(["method", *head]), cells(["---", *["---:"] * len(head)])]
    front = pareto_front(points)
    for name in unique(point["name"] for point in points):
        own = [point for point in points if point["name"] == name]
        line = [name, *(best(own, "captured", share, "{:.3f}") for share in WITHIN), *answers(name)]
        enough = [point["bytes_read"] for point in own if point["captured"] >= ENOUGH]
        line.append(f"{min(enough):.1%}" if enough else "")
        on_front = sum(point["method"] in front for point in own)
        line.append(f"{on_front} of {len(own)}" if competes(name) else "")
        lines.append(cells(line))
    return "\n".join(lines)


def time_table(rows: list[dict[str, Any]]) -> str:
    """A line a method and case of `python -m benchmarks.decode_attention --method ...`, in the order of `EACH`."""
    head = [
        "case",
        "method",
        "kernels, µs",
        "wall, µs",
        "best dense, wall, µs",
        "bytes of dense",
        "tokens",
        "mass held",
    ]
    lines = [cells(head), cells(["---", "---", *["---:"] * (len(head) - 2)])]
    place = {method: i for i, method in enumerate(EACH)}
    for row in sorted(rows, key=lambda row: place.get(row["implementation"], len(EACH))):
        dense = min(row["dense"].values(), key=lambda times: times["wall_us"]["median"])
        line = [speed_report.label(row), f"`{row['implementation']}`"]
        line += [f"{row[name]['median']:.0f}" for name in ("kernel_us", "wall_us")]
        line += [f"{dense['wall_us']['median']:.0f}", f"{row['bytes'] / dense['bytes']:.1%}"]
        lines.append(cells([*line, f"{row['kept']:.1%}", f"{row['true_mass']:.1%}"]))
    return "\n".join(lines)


def means(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A point a method and budget: means over the tasks."""
    points = []
    for method in unique(row["method"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["method"] == method]
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("right", "captured", "kept", "bytes_read")}
        points.append({"name": rows[0]["name"], "method": method, **mean})
    return points


def best(points: list[dict[str, Any]], measure: str, share: float, form: str) -> str:
    """The most of a measure among the points that read a share of the bytes at most."""
    within = [point[measure] for point in points if point["bytes_read"] <= share]
    return form.format(max(within)) if within else ""


def pareto_front(points: list[dict[str, Any]]) -> set[str]:
    """Points of which no other captures as much with fewer bytes; oracles apart, and KIVI, which leaves nothing out."""
    competing = [point for point in points if competes(point["name"])]
    front, most = set(), -1.0
    for point in sorted(competing, key=lambda point: (point["bytes_read"], -point["captured"])):
        if point["captured"] > most:
            front.add(point["method"])
            most = point["captured"]
    return front


def competes(name: str) -> bool:
    """The method is one to use, and leaves tokens out."""
    return not is_oracle(name) and name.lower() != "kivi"


def is_oracle(name: str) -> bool:
    return name.startswith("oracle")


def draw(content: dict[str, Any]) -> plt.Figure:
    """True mass captured, and needles answered, against the share of bytes read: a row a task, a curve a method."""
    tasks = list(content["tasks"])
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(11, 4.2 * len(tasks)), layout="constrained", sharex=True, squeeze=False
    )
    for row_axes, task in zip(axes, tasks, strict=True):
        for i, name in enumerate(unique(row["name"] for row in content["rows"])):
            rows = [row for row in content["rows"] if row["name"] == name and row["task"] == task]
            rows.sort(key=lambda row: row["bytes_read"])
            style = {
                "marker": "os^Dv"[i % 5], "color": "k" if name == "RaBitQ" else COLORS(i % 20), "markersize": 4,
                "linestyle": ":" if is_oracle(name) else "-", "linewidth": 2.5 if name == "RaBitQ" else 1,
            }  # fmt: skip
            for axis, measure in zip(row_axes, ("captured", "right"), strict=True):
                axis.plot([row["bytes_read"] for row in rows], [row[measure] for row in rows], label=name, **style)
        for axis, label in zip(row_axes, ("true attention captured", "needles answered"), strict=True):
            axis.set(title=f"{label}, {task}", ylim=(-0.02, 1.02))
            scale_shares(axis)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("share of dense attention's bytes")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure
