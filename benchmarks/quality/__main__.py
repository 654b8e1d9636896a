"""Evaluate a checkpoint, dense and with RaBitQ caches: what it answers, what it reads, what its attention captures.

    python -m benchmarks.quality                                  # the model that ships with the library
    python -m benchmarks.quality --model PATH --chat --tokens 32768 --top-p 0.9 --set dense_layers=0
    python -m benchmarks.quality --model PATH --longbench FOLDER --gsm8k FOLDER
    python -m benchmarks.quality --compare --name methods         # other retrieval methods too

writes benchmarks/results/quality.json, a table beside it (.md), and pictures (.png).
"""

import functools
import typing
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.quality import plots
from benchmarks.quality.compared import COMPARED
from benchmarks.quality.parts import Part, evaluate_part
from benchmarks.quality.report import table
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.workers import spread, worker_options
from benchmarks.record import RESULTS, commit_option, write_result
from models import RETRIEVER
from rabitq_jax import RaBitQConfig
from rabitq_jax.selectors.arguments import parse_selector

TOKENS = (4096, 8192, 16384, 32768)
TOP_P = (0.5, 0.8, 0.9, 0.95, 0.99)


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", default=str(RETRIEVER), help="Folder or hub id; the model that ships with the library.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)), help="Retrieval tasks; all by default.")
@click.option("--tokens", multiple=True, type=int, default=TOKENS, show_default=True, help="Lengths of the prompts.")
@click.option("--examples", default=100, show_default=True, help="Problems of each task and length.")
@click.option("--probes", default=8, show_default=True, help="Problems of each task whose attention is measured.")
@click.option("--probe-tokens", multiple=True, type=int, help="Lengths at which it is; all by default.")
@click.option("--top-p", multiple=True, type=float, default=TOP_P, show_default=True, help="Shares of attention.")
@click.option("--method", "methods", multiple=True, metavar="NAME:ARGUMENTS", help="Another retrieval method.")
@click.option("--compare", is_flag=True, help="Other methods: those of compared.py too.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A field of RaBitQConfig.")
@click.option("--longbench", "longbench_folder", type=click.Path(path_type=Path), help="Folder of LongBench's files.")
@click.option("--gsm8k", "gsm8k_folder", type=click.Path(path_type=Path), help="Folder of train.jsonl and test.jsonl.")
@click.option("--context", default=32768, show_default=True, help="Tokens that LongBench's prompts are cut to.")
@click.option("--chat", is_flag=True, help="Send prompts as a user's message, by the checkpoint's chat template.")
@click.option("--name", default="quality", show_default=True, help="Name of the results.")
@worker_options
@commit_option
def main(
    model, dtype, tasks, tokens, examples, probes, probe_tokens, top_p, methods, compare, settings, longbench_folder,
    gsm8k_folder, context, chat, name, processes, gpus, commit,
) -> None:  # fmt: skip
    overrides = parse_settings(settings)
    configs = (None, *(RaBitQConfig(**{"top_p": p, **overrides}) for p in top_p))
    methods = (*methods, *COMPARED * compare)
    for method in methods:
        parse_selector(method)
    part = functools.partial(
        Part, model=model, dtype=dtype, configs=configs, methods=methods, chat=chat, examples=examples
    )
    parts = []
    if longbench_folder:
        parts.append(part(source="longbench", folder=longbench_folder, tokens=context))
    if gsm8k_folder:
        parts.append(part(source="gsm8k", folder=gsm8k_folder))
    if not parts:
        # A chat's replies are not texts whose tokens are known beforehand.
        probed = () if chat else probe_tokens or tokens
        parts = [
            part(tasks=tuple(tasks or TASKS), tokens=size, probes=probes if size in probed else 0) for size in tokens
        ]
    # A length is a part. Where there are more processes, each takes some of a length's ways to decode.
    parts = [piece for whole in parts for piece in whole.split(max(1, processes // len(parts)))]
    content = {
        "model": model if model != str(RETRIEVER) else "retriever", "dtype": dtype, "settings": overrides,
    }  # fmt: skip
    done: dict[int, tuple[list[dict], list[dict]]] = {}
    for i, measured in spread(evaluate_part, parts, processes=processes, gpus=gpus):
        done[i] = measured
        rows, probed_rows = zip(*(done[j] for j in sorted(done)), strict=True)
        content |= {"rows": sum(rows, []), "probes": sum(probed_rows, [])}
        # As soon as it is known, so that it is kept if what follows fails.
        path = write_result(f"{name}.json", content, commit=commit)
    path.with_suffix(".md").write_text(table(content) + "\n", encoding="utf-8")
    plots.draw(content, RESULTS, name)
    click.echo(table(content))
    click.echo(path)


def parse_settings(settings: Sequence[str]) -> dict:
    """Fields of RaBitQConfig from texts such as "sink=16".

    Raises:
      ValueError: a text has no "=", or names no field.
    """
    hints = typing.get_type_hints(RaBitQConfig)
    parsed = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or field not in hints:
            raise ValueError(f"--set must be a field of RaBitQConfig and its value, as sink=16; got {setting!r}")
        kind = hints[field]
        parsed[field] = kind(value) if kind in (int, float) else value
    return parsed


if __name__ == "__main__":
    main()
