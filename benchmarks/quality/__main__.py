"""Evaluate a checkpoint, dense and with RaBitQ caches: what it answers, what it reads, what its attention captures.

    python -m benchmarks.quality                                  # the model that ships with the library
    python -m benchmarks.quality --model PATH --chat --tokens 32768 --top-p 0.9 --set dense_layers=0
    python -m benchmarks.quality --model PATH --longbench FOLDER --gsm8k FOLDER

writes benchmarks/results/quality.json, a table beside it (.md), and pictures (.png).
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from pathlib import Path

import click
import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.quality import gsm8k, longbench, plots
from benchmarks.quality.evaluate import Known, answer, compare, probe, summarize
from benchmarks.quality.haystack import standard_library
from benchmarks.quality.problem import Problem
from benchmarks.quality.report import table
from benchmarks.quality.tasks import TASKS, make_problems
from benchmarks.quality.workers import spread, worker_options
from benchmarks.record import RESULTS, commit_option, write_result
from models import RETRIEVER, Tokenizer, load_pretrained
from rabitq_jax import RaBitQConfig

TOKENS = (4096, 8192, 16384, 32768)
TOP_P = (0.5, 0.8, 0.9, 0.95, 0.99)
TEXT_PIECES, TEXT_NEW_TOKENS = 8, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one process evaluates at a time: problems with prompts of up to so many tokens, in several ways.

    Attributes:
      source: "tasks", or the format of the files in `folder`: "longbench" or "gsm8k".
      probes: problems of each task whose attention is measured; 0 measures none.
    """

    model: str
    dtype: str
    configs: tuple[RaBitQConfig | None, ...]
    chat: bool
    examples: int
    source: str = "tasks"
    tasks: tuple[str, ...] = ()
    tokens: int = 0
    probes: int = 0
    folder: Path | None = None


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", default=str(RETRIEVER), help="Folder or hub id; the model that ships with the library.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)), help="Retrieval tasks; all by default.")
@click.option("--tokens", multiple=True, type=int, default=TOKENS, show_default=True, help="Lengths of the prompts.")
@click.option("--examples", default=100, show_default=True, help="Problems of each task and length.")
@click.option("--probes", default=8, show_default=True, help="Problems of each task whose attention is measured.")
@click.option("--probe-tokens", multiple=True, type=int, help="Lengths at which it is; all by default.")
@click.option("--top-p", multiple=True, type=float, default=TOP_P, show_default=True, help="Shares of attention.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A field of RaBitQConfig.")
@click.option("--longbench", "longbench_folder", type=click.Path(path_type=Path), help="Folder of LongBench's files.")
@click.option("--gsm8k", "gsm8k_folder", type=click.Path(path_type=Path), help="Folder of train.jsonl and test.jsonl.")
@click.option("--context", default=32768, show_default=True, help="Tokens that LongBench's prompts are cut to.")
@click.option("--chat", is_flag=True, help="Send prompts as a user's message, by the checkpoint's chat template.")
@click.option("--name", default="quality", show_default=True, help="Name of the results.")
@worker_options
@commit_option
def main(
    model, dtype, tasks, tokens, examples, probes, probe_tokens, top_p, settings, longbench_folder, gsm8k_folder,
    context, chat, name, processes, gpus, commit,
) -> None:  # fmt: skip
    overrides = parse_settings(settings)
    configs = (None, *(RaBitQConfig(**{"top_p": p, **overrides}) for p in top_p))
    part = functools.partial(Part, model=model, dtype=dtype, configs=configs, chat=chat, examples=examples)
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


def evaluate_part(part: Part) -> tuple[list[dict], list[dict]]:
    """A row for each task and way of decoding: answers, and what they read; and rows of what attention captures."""
    decoder, tokenizer = load_pretrained(part.model, dtype=jnp.dtype(part.dtype))
    tokens, problems = load_problems(part, tokenizer)
    with tqdm(total=len(problems) * len(part.configs), desc=f"answers, {tokens} tokens", unit="reply") as bar:
        answered = answer(
            decoder, tokenizer, problems, part.configs, key=jax.random.key(0), chat=part.chat, advance=bar.update
        )
    rows = [
        {"tokens": tokens, "top_p": config and config.top_p, **row}
        for config, replies in zip(part.configs, answered, strict=True)
        for row in summarize(replies)
    ]
    return rows, probe_rows(decoder, tokenizer, part, problems) if part.probes else []


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


def load_problems(part: Part, tokenizer: Tokenizer) -> tuple[int, list[Problem]]:
    """A bound on the prompts' tokens, and the problems."""
    if part.source == "tasks":
        make = functools.partial(make_problems, tokens=part.tokens, count=part.examples, tokenizer=tokenizer)
        return part.tokens, [problem for task in part.tasks for problem in make(TASKS[task])]
    if part.source == "gsm8k":
        problems = gsm8k.load(part.folder, limit=part.examples)
        return max(len(tokenizer.encode(problem.prompt)) for problem in problems), problems
    problems = longbench.load(part.folder, limit=part.examples)
    room = part.tokens - max(problem.max_new_tokens for problem in problems)
    cut = lambda problem: longbench.cut_middle(problem.prompt, tokenizer, room)  # noqa: E731
    return room, [dataclasses.replace(problem, prompt=cut(problem)) for problem in problems]


def probe_rows(decoder, tokenizer, part: Part, problems: Sequence[Problem]) -> list[dict]:
    """What decoding the known answers, and plain text, attends: a row for each set of texts and way of decoding."""
    by_task: dict[str, list[Problem]] = {}
    for problem in problems:
        by_task.setdefault(problem.task, []).append(problem)
    chosen = [problem for group in by_task.values() for problem in group[: part.probes]]
    text = standard_library("test").decode()
    sets = {
        "answers": Known.answers(tokenizer, chosen),
        "text": Known.plain(tokenizer, text, part.tokens, TEXT_NEW_TOKENS, TEXT_PIECES),
    }
    rows = []
    for name, known in sets.items():
        passes = probe(decoder, known, part.configs, key=jax.random.key(1), progress=True)
        for config, run in zip(part.configs, passes, strict=True):
            row = compare(run, passes[part.configs.index(None)])
            rows.append({"tokens": part.tokens, "texts": name, "top_p": config and config.top_p, **row})
    return rows


if __name__ == "__main__":
    main()
