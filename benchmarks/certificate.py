"""True attention captured against the p that was asked for: plain, debiased and certified, and what they keep.

    python -m benchmarks.certificate             # the model that ships with the library, and heads of hard_heads.py
    python -m benchmarks.certificate --tokens 16384 --examples 8 --rotations 640

The model decodes the known answers of every retrieval task; every query head of every step is a head-step. The hard
heads have 1,024 tokens, and each query head is alone in its group. Writes benchmarks/results/certificate.json and .png.
"""

from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import hard_heads
from benchmarks.certificate_report import draw, table
from benchmarks.quality.evaluate import Known, compare, probe
from benchmarks.quality.plots import save
from benchmarks.quality.tasks import TASKS, make_problems
from benchmarks.record import RESULTS, commit_option, write_result
from models import RETRIEVER, load_pretrained
from rabitq_jax import RaBitQConfig

TOP_P = (0.5, 0.8, 0.9, 0.95, 0.99)
SELECTIONS = ("plain", "debiased", "certified")
HARD_TOKENS = 1024
MEASURES = ("captured", "claimed", "verified", "extended", "certified", "kept", "output_error")


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", default=str(RETRIEVER), help="Folder or hub id; the model that ships with the library.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)), help="Retrieval tasks; all by default.")
@click.option("--tokens", default=4096, show_default=True, help="Length of the prompts.")
@click.option("--examples", default=2, show_default=True, help="Problems of each task.")
@click.option("--rotations", default=80, show_default=True, help="Of the hard heads, 32 head-steps each.")
@click.option("--top-p", multiple=True, type=float, default=TOP_P, show_default=True)
@click.option("--failure-rate", default=1e-3, show_default=True)
@click.option("--name", default="certificate", show_default=True, help="Name of the results.")
@commit_option
def main(model, dtype, tasks, tokens, examples, rotations, top_p, failure_rate, name, commit) -> None:
    tasks = tasks or list(TASKS)
    content = {
        "model": model if model != str(RETRIEVER) else "retriever", "dtype": dtype, "tasks": tasks, "tokens": tokens,
        "examples": examples, "failure_rate": failure_rate, "kinds": hard_heads.KINDS, "hard_tokens": HARD_TOKENS,
        "rows": measure_model(model, dtype, tasks, tokens, examples, top_p, failure_rate),
    }  # fmt: skip
    # As soon as it is known, so that it is kept if what follows fails.
    write_result(f"{name}.json", content, commit=commit)
    content["rows"] += measure_hard_heads(rotations, top_p, failure_rate)
    path = write_result(f"{name}.json", content, commit=commit)
    save(draw(content), RESULTS / f"{name}.png")
    click.echo(table(content))
    click.echo(path)


def choices(top_p, failure_rate: float, tails=("drop",)) -> list[dict[str, Any]]:
    """Fields of RaBitQConfig: every selection at every p, with every tail that it can have."""
    return [
        {"selection": selection, "tail": tail, "top_p": p, "failure_rate": failure_rate}
        for selection in SELECTIONS
        for tail in (tails if selection != "plain" else ("drop",))
        for p in top_p
    ]


def measure_model(model: str, dtype: str, tasks, tokens: int, examples: int, top_p, failure_rate: float) -> list[dict]:
    """A row for each way of choosing; all layers have codes."""
    decoder, tokenizer = load_pretrained(model, dtype=jnp.dtype(dtype))
    problems = [problem for task in tasks for problem in make_problems(TASKS[task], tokens, examples, tokenizer)]
    known = Known.answers(tokenizer, problems)
    ways = choices(top_p, failure_rate, ("drop", "mean"))
    configs = [None, *(RaBitQConfig(dense_layers=0, **way) for way in ways)]
    dense, *passes = probe(decoder, known, configs, key=jax.random.key(0), progress=True)
    rows = []
    for way, run in zip(ways, passes, strict=True):
        found = {name: [] for name in MEASURES}
        for part in run:
            for name, values in found.items():
                array = getattr(part.probes, name)
                if array is not None:
                    values.append(array[part.valid].ravel())
        steps = {name: np.concatenate(values) for name, values in found.items() if values}
        whole = compare(run, dense)
        outcome = {name: whole[name] for name in ("exact", "divergence", "bytes_read")}
        rows.append({"heads": "model"} | way | summarize(steps, way["top_p"]) | outcome)
    return rows


def measure_hard_heads(rotations: int, top_p, failure_rate: float) -> list[dict]:
    """A row for each kind and way of choosing."""
    ways = choices(top_p, failure_rate)
    rows = []
    with tqdm(total=len(hard_heads.KINDS) * len(ways), desc="hard heads", unit="case") as bar:
        for way in ways:
            for kind in hard_heads.KINDS:
                key = jax.random.key(list(hard_heads.KINDS).index(kind))
                found = hard_heads.measure_kind(key, kind, HARD_TOKENS, rotations, RaBitQConfig(**way))
                rows.append({"heads": kind} | way | summarize(found, way["top_p"]))
                bar.update()
    return rows


def summarize(steps: dict[str, np.ndarray], top_p: float) -> dict[str, float]:
    """Means over head-steps, the share of them that captured less than p, and the least that one of them captured."""
    means = {name: float(steps[name].mean()) for name in steps if name != "own_kept"}
    captured = steps["captured"]
    return {
        "head_steps": len(captured), **means,
        "short": float(np.mean(captured < top_p)), "least": float(captured.min()),
        "deviation": float(captured.std()),
    }  # fmt: skip


if __name__ == "__main__":
    main()
