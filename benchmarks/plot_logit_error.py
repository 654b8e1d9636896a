"""The figure of logit_error.py: errors for each kind of heads, and what Top-p delivers."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.synthetic import KINDS

CENTROIDS = {"key_centroid": ("block", "prompt"), "query_centroid": ("none", "prompt")}


def plot(errors: list[dict], delivery: list[dict], path: Path) -> None:
    """Errors by centroids (bars; rotations and roundings as points on them), and true against requested share."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    head_dims = sorted({row["head_dim"] for row in errors})
    for axis, head_dim in zip(axes, head_dims, strict=False):
        _plot_errors(axis, [row for row in errors if row["head_dim"] == head_dim])
        axis.set(title=f"head dimension {head_dim}", ylabel="deviation of a logit's error, nats")
    axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    _plot_delivery(axes[2], [row for row in delivery if row["head_dim"] == head_dims[-1]])
    axes[2].set_title(f"Top-p (p dotted), head dimension {head_dims[-1]}")
    figure.savefig(path, dpi=110)


def _plot_errors(axis, rows) -> None:
    combinations = list(itertools.product(*CENTROIDS.values()))
    for i, centroids in enumerate(combinations):
        x = np.arange(len(KINDS)) + 0.2 * (i - 1.5)
        groups = [
            [row["nats"] for row in rows if row["kind"] == kind and tuple(row[name] for name in CENTROIDS) == centroids]
            for kind in KINDS
        ]
        label = "c_k of the {}, c_q {}".format(centroids[0], "zero" if centroids[1] == "none" else "of the prompt")
        axis.bar(x, [np.mean(group) for group in groups], 0.18, label=label)
        for at, group in zip(x, groups, strict=True):
            axis.plot([at] * len(group), group, "k.", markersize=3)
    axis.set_xticks(range(len(KINDS)), list(KINDS))
    axis.grid(axis="y", alpha=0.3)


def _plot_delivery(axis, rows) -> None:
    for color, kind in zip(("C0", "C1", "C2", "C3"), KINDS, strict=True):
        for scope, fill in (("all", "full"), ("scored", "none")):
            points = [row for row in rows if row["kind"] == kind and row["top_p_scope"] == scope]
            kept, delivered = ([row[name] for row in points] for name in ("kept", "delivered"))
            axis.plot(kept, delivered, "o-", color=color, fillstyle=fill, label=f"{kind}, p over {scope}")
    for p in {row["top_p"] for row in rows}:
        axis.axhline(p, color="k", linewidth=0.6, linestyle=":")
    axis.set(xlabel="share of tokens attended", ylabel="true attention in a head's own tokens", xlim=0, ylim=(None, 1))
    axis.legend(fontsize=8, loc="lower right")
