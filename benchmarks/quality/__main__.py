"""Evaluate a checkpoint, dense and with RaBitQ caches: what it answers, what it reads, what its attention captures.

    python -m benchmarks.quality                                  # the model that ships with the library
    python -m benchmarks.quality --model PATH --chat --tokens 32768 --top-p 0.9 --set dense_layers=0
    python -m benchmarks.quality --model PATH --longbench FOLDER --gsm8k FOLDER

writes benchmarks/results/quality.json, a table beside it (.md), and pictures (.png).
"""

import dataclasses
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
from benchmarks.record import RESULTS, commit_option, write_result
from models import RETRIEVER, Tokenizer, load_pretrained
from rabitq_jax import RaBitQConfig

TOKENS = (4096, 8192, 16384, 32768)
TOP_P = (0.5, 0.8, 0.9, 0.95, 0.99)
TEXT_PIECES, TEXT_NEW_TOKENS = 8, 128


@dataclasses.dataclass(frozen=True)
class Suite:
    """Problems with prompts of up to so many tokens."""

    tokens: int
    problems: list[Problem]
    known: bool  # their answers are texts that the model itself would write


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
@commit_option
def main(
    model, dtype, tasks, tokens, examples, probes, probe_tokens, top_p, settings, longbench_folder, gsm8k_folder,
    context, chat, name, commit,
) -> None:  # fmt: skip
    overrides = parse_settings(settings)
    configs = [None, *(RaBitQConfig(**{"top_p": p, **overrides}) for p in top_p)]
    decoder, tokenizer = load_pretrained(model, dtype=jnp.dtype(dtype))
    if longbench_folder or gsm8k_folder:
        suites = published_suites(tokenizer, longbench_folder, gsm8k_folder, context, examples)
    else:
        suites = [retrieval_suite(tokenizer, tasks or list(TASKS), size, examples) for size in tokens]
    content = {
        "model": model if model != str(RETRIEVER) else "retriever", "dtype": dtype, "settings": overrides,
        "rows": [], "probes": [],
    }  # fmt: skip
    total = sum(len(suite.problems) for suite in suites) * len(configs)
    with tqdm(total=total, desc="answers", unit="reply") as bar:
        for suite in suites:
            answered = answer(
                decoder, tokenizer, suite.problems, configs, key=jax.random.key(0), chat=chat, advance=bar.update
            )  # fmt: skip
            for config, replies in zip(configs, answered, strict=True):
                shared = {"tokens": suite.tokens, "top_p": config and config.top_p}
                content["rows"] += [shared | row for row in summarize(replies)]
            # As soon as it is known, so that it is kept if what follows fails.
            path = write_result(f"{name}.json", content, commit=commit)
            if suite.known and not chat and suite.tokens in (probe_tokens or tokens):
                content["probes"] += probe_suite(decoder, tokenizer, suite, configs, probes)
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


def retrieval_suite(tokenizer: Tokenizer, tasks: Sequence[str], tokens: int, examples: int) -> Suite:
    problems = [problem for task in tasks for problem in make_problems(TASKS[task], tokens, examples, tokenizer)]
    return Suite(tokens, problems, known=True)


def published_suites(tokenizer: Tokenizer, longbench_folder, gsm8k_folder, context: int, limit: int) -> list[Suite]:
    suites = []
    if longbench_folder:
        problems = longbench.load(longbench_folder, limit=limit)
        room = context - max(problem.max_new_tokens for problem in problems)
        problems = [
            dataclasses.replace(problem, prompt=longbench.cut_middle(problem.prompt, tokenizer, room))
            for problem in problems
        ]
        suites.append(Suite(room, problems, known=False))
    if gsm8k_folder:
        problems = gsm8k.load(gsm8k_folder, limit=limit)
        longest = max(len(tokenizer.encode(problem.prompt)) for problem in problems)
        suites.append(Suite(longest, problems, known=False))
    return suites


def probe_suite(decoder, tokenizer, suite: Suite, configs, probes: int) -> list[dict]:
    """What decoding the known answers, and plain text, attends: a row for each set of texts and way of decoding."""
    by_task: dict[str, list[Problem]] = {}
    for problem in suite.problems:
        by_task.setdefault(problem.task, []).append(problem)
    chosen = [problem for group in by_task.values() for problem in group[:probes]]
    text = standard_library("test").decode()
    sets = {
        "answers": Known.answers(tokenizer, chosen),
        "text": Known.plain(tokenizer, text, suite.tokens, TEXT_NEW_TOKENS, TEXT_PIECES),
    }
    rows = []
    for name, known in sets.items():
        passes = probe(decoder, known, configs, key=jax.random.key(1), progress=True)
        for config, run in zip(configs, passes, strict=True):
            row = compare(run, passes[configs.index(None)])
            rows.append({"tokens": suite.tokens, "texts": name, "top_p": config and config.top_p, **row})
    return rows


if __name__ == "__main__":
    main()
