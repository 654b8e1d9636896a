"""What each choice in RaBitQConfig is worth on a trained model, at equal bytes read.

    python -m benchmarks.quality.sweep          # the model that ships with the library

Each choice is changed alone, and decodes the known answers of every retrieval task at several p. Read off these curves
at the same share of bytes, choices can be compared. Writes benchmarks/results/sweep.json, sweep.md and sweep.png.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from benchmarks.quality.evaluate import Known, compare, probe
from benchmarks.quality.plots import save, scale_shares
from benchmarks.quality.report import sweep_table, unique
from benchmarks.quality.tasks import TASKS, make_problems
from benchmarks.quality.workers import spread, worker_options
from benchmarks.record import RESULTS, commit_option, write_result
from models import RETRIEVER, load_pretrained
from rabitq_jax import RaBitQConfig

TOP_P = (0.8, 0.95, 0.99)
# Selections that hold more of the attention read more for the same p.
VERIFYING_TOP_P = (0.5, 0.8, 0.95)
# One choice each; all others are the defaults.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One change to the defaults, at one p."""

    change: dict[str, Any]
    top_p: float

    @property
    def label(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.change.items()) or "base"

    @property
    def config(self) -> RaBitQConfig:
        return RaBitQConfig(top_p=self.top_p, **self.change)


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", default=str(RETRIEVER), help="Folder or hub id; the model that ships with the library.")
@click.option("--tokens", default=16384, show_default=True, help="Length of the prompts.")
@click.option("--examples", default=5, show_default=True, help="Problems of each task.")
@click.option("--name", default="sweep", show_default=True, help="Name of the results.")
@worker_options
@commit_option
def main(model: str, tokens: int, examples: int, name: str, processes: int, gpus: int, commit: str) -> None:
    cases = [
        Case(change=change, top_p=top_p)
        for change in VARIANTS
        for top_p in (VERIFYING_TOP_P if "selection" in change else TOP_P)
    ]
    # Each process reads the prompts, and decodes them densely too.
    shares = [cases[i::processes] for i in range(processes)]
    rows: list[dict] = [{}] * len(cases)
    dense: dict = {}
    run = functools.partial(measure, model, tokens, examples)
    for i, measured in spread(run, shares, processes=processes, gpus=gpus):
        dense, *rows[i::processes] = measured
    content = {
        "model": model if model != str(RETRIEVER) else "retriever", "tokens": tokens, "examples": examples,
        "dense": dense,
        "rows": [{"change": case.label, "top_p": case.top_p, **row} for case, row in zip(cases, rows, strict=True)],
    }  # fmt: skip
    path = write_result(f"{name}.json", content, commit=commit)
    path.with_suffix(".md").write_text(sweep_table(content) + "\n", encoding="utf-8")
    save(draw(content), RESULTS / f"{name}.png")
    click.echo(sweep_table(content))
    click.echo(path)


def measure(model: str, tokens: int, examples: int, cases: Sequence[Case]) -> list[dict]:
    """Measures of dense decoding, and of each case."""
    decoder, tokenizer = load_pretrained(model, dtype=jnp.bfloat16)
    problems = [problem for task in TASKS.values() for problem in make_problems(task, tokens, examples, tokenizer)]
    known = Known.answers(tokenizer, problems)
    configs = [None, *(case.config for case in cases)]
    passes = probe(decoder, known, configs, key=jax.random.key(2), progress=True)
    return [compare(run, passes[0]) for run in passes]


def draw(content: dict[str, Any]) -> plt.Figure:
    """Divergence from dense, and attention captured, against the bytes read: a line a change."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for i, change in enumerate(unique(row["change"] for row in content["rows"])):
        rows = sorted((row for row in content["rows"] if row["change"] == change), key=lambda row: row["top_p"])
        style = {"color": "k", "linewidth": 2.5} if change == "base" else {"color": plt.cm.tab20(i % 20)}
        for axis, name in zip(axes, ("divergence", "captured"), strict=True):
            points = [row["bytes_read"] for row in rows], [row[name] for row in rows]
            axis.plot(*points, "o-", markersize=3, label=change, **style)
    axes[0].set(ylabel="KL to dense, nats", yscale="log")
    axes[1].set(ylabel="attention captured")
    for axis in axes:
        axis.set_xlabel("bytes read, of dense attention's")
        scale_shares(axis)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
