"""What each choice in RaBitQConfig is worth on a trained model, at equal bytes read.

    python -m benchmarks.quality.sweep          # the model that ships with the library

Each choice is changed alone, and decodes the known answers of every retrieval task at several p. Read off these curves
at the same share of bytes, choices can be compared. Writes benchmarks/results/sweep.json, sweep.md and sweep.png.
"""

import dataclasses
from typing import Any

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.quality.evaluate import Known, compare, probe
from benchmarks.quality.plots import save
from benchmarks.quality.report import cells, unique
from benchmarks.quality.tasks import TASKS, make_problems
from benchmarks.record import RESULTS, commit_option, write_result
from models import RETRIEVER, load_pretrained
from rabitq_jax import RaBitQConfig

TOP_P = (0.8, 0.95, 0.99)
# One choice each; all others are the base's. The shipped model has few layers, so that its base has no dense ones.
BASE: dict[str, Any] = {"dense_layers": 0}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p_scope": "scored"},
    {"selection": "debiased"},
    {"selection": "debiased", "tail": "mean"},
    {"selection": "certified"},
    {"selection": "certified", "tail": "mean"},
    {"sink": 0},
    {"sink": 4},
    {"sink": 64},
    {"recent": 16},
    {"recent": 256},
    {"interval": 64},
    {"interval": 256},
    {"dense_layers": 1},
    {"dense_layers": 2},
    {"rotation": "hadamard"},
    {"rotation": "none"},
    {"rotation_seed": 1},
    {"key_centroid": "prompt"},
    {"key_centroid": "none"},
    {"query_centroid": "prompt"},
    {"query_rounding": "nearest"},
)
MEASURES = ("exact", "divergence", "captured", "error_nats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One change to the base, at one p."""

    change: dict[str, Any]
    top_p: float

    @property
    def label(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.change.items()) or "base"

    @property
    def config(self) -> RaBitQConfig:
        return RaBitQConfig(top_p=self.top_p, **BASE | self.change)


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", default=str(RETRIEVER), help="Folder or hub id; the model that ships with the library.")
@click.option("--tokens", default=16384, show_default=True, help="Length of the prompts.")
@click.option("--examples", default=5, show_default=True, help="Problems of each task.")
@click.option("--name", default="sweep", show_default=True, help="Name of the results.")
@commit_option
def main(model: str, tokens: int, examples: int, name: str, commit: str) -> None:
    decoder, tokenizer = load_pretrained(model, dtype=jnp.bfloat16)
    problems = [problem for task in TASKS.values() for problem in make_problems(task, tokens, examples, tokenizer)]
    known = Known.answers(tokenizer, problems)
    cases = [Case(change=change, top_p=top_p) for change in VARIANTS for top_p in TOP_P]
    configs = [None, *(case.config for case in cases)]
    dense, *passes = probe(decoder, known, configs, key=jax.random.key(2), progress=True)
    content = {
        "model": model if model != str(RETRIEVER) else "retriever", "tokens": tokens, "examples": examples,
        "base": BASE, "dense": compare(dense, dense),
        "rows": [
            {"change": case.label, "top_p": case.top_p, **compare(run, dense)}
            for case, run in zip(cases, passes, strict=True)
        ],
    }  # fmt: skip
    path = write_result(f"{name}.json", content, commit=commit)
    path.with_suffix(".md").write_text(table(content) + "\n", encoding="utf-8")
    save(draw(content), RESULTS / f"{name}.png")
    click.echo(table(content))
    click.echo(path)


def table(content: dict[str, Any]) -> str:
    """A line a change: its measures at the bytes that the base reads at the middle p, interpolated along its own p."""
    base = sorted((row for row in content["rows"] if row["change"] == "base"), key=lambda row: row["top_p"])
    target = base[len(base) // 2]["bytes_read"]
    lines = [
        f"At {target:.1%} of the bytes of dense attention, {content['tokens']:,} tokens, answers of every task:",
        "",
        cells(["change", "p", "answers exact", "KL to dense, nats", "mass captured", "error of logits, nats"]),
        cells(["---", *["---:"] * 5]),
    ]
    for change in unique(row["change"] for row in content["rows"]):
        rows = sorted((row for row in content["rows"] if row["change"] == change), key=lambda row: row["bytes_read"])
        bytes_read = [row["bytes_read"] for row in rows]
        if not bytes_read[0] <= target <= bytes_read[-1]:
            ends = f"{bytes_read[0]:.1%} to {bytes_read[-1]:.1%} of the bytes"
            lines.append(cells([f"`{change}`", ends, "", "", "", f"{rows[0]['error_nats']:.2f}"]))
            continue
        at = {name: float(np.interp(target, bytes_read, [row[name] for row in rows])) for name in ("top_p", *MEASURES)}
        lines.append(
            cells(
                [
                    f"`{change}`",
                    f"{at['top_p']:.3f}",
                    f"{at['exact']:.1%}",
                    f"{at['divergence']:.4f}",
                    f"{at['captured']:.4f}",
                    f"{at['error_nats']:.2f}",
                ]
            )
        )
    return "\n".join(lines)


def draw(content: dict[str, Any]) -> plt.Figure:
    """Divergence from dense, and attention captured, against the bytes read: a line a change."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for i, change in enumerate(unique(row["change"] for row in content["rows"])):
        rows = sorted((row for row in content["rows"] if row["change"] == change), key=lambda row: row["top_p"])
        style = {"color": "k", "linewidth": 2.5} if change == "base" else {"color": plt.cm.tab20(i % 20)}
        for axis, name in zip(axes, ("divergence", "captured"), strict=True):
            points = [row["bytes_read"] for row in rows], [row[name] for row in rows]
            axis.plot(*points, "o-", markersize=3, label=change, **style)
    axes[0].set(ylabel="KL to dense, nats", yscale="log", xscale="log", xlabel="bytes read, of dense attention's")
    axes[1].set(ylabel="attention captured", xscale="log", xlabel="bytes read, of dense attention's")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
