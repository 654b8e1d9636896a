"""Retrieval tasks in the manner of RULER (arXiv 2404.06654): facts hidden in held-out text, one question at its end."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.quality.facts import (
    VALUES,
    Fact,
    chain,
    distinct,
    multi_query,
    multi_value,
    random_key,
    random_number,
    random_variable,
    single,
)
from benchmarks.quality.haystack import excerpt, standard_library
from benchmarks.quality.problem import Problem
from benchmarks.quality.word_counts import word_count_text
from models import Tokenizer

# Tokens beyond the answer's own, for a reply that opens with a space or ends late.
SPARE_TOKENS = 8
SEED = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a text of a task holds: the fact that is asked for, and others beside it."""

    asked: Fact
    others: tuple[Fact, ...] = ()


def _single(kind: str, others: int, rng: np.random.Generator) -> Facts:
    facts = [single(kind, key, VALUES[kind](rng)) for key in distinct(random_key, 1 + others, rng)]
    return Facts(asked=facts[0], others=tuple(facts[1:]))


def _multi_value(rng: np.random.Generator) -> Facts:
    return Facts(asked=multi_value("number", random_key(rng), distinct(random_number, 4, rng)))


def _multi_query(rng: np.random.Generator) -> Facts:
    return Facts(asked=multi_query("number", [(key, random_number(rng)) for key in distinct(random_key, 4, rng)]))


def _chains(rng: np.random.Generator) -> Facts:
    names = distinct(random_variable, 10, rng)
    return Facts(asked=chain(names[:5], random_number(rng)), others=(chain(names[5:], random_number(rng)),))


@dataclasses.dataclass(frozen=True)
class Task:
    """A name, what it hides, and the facts of one text; None stands for a text of words alone."""

    name: str
    about: str
    facts: Callable[[np.random.Generator], Facts] | None


TASKS = {
    task.name: task
    for task in (
        Task("single-number", "one key, its value a number of 7 digits", functools.partial(_single, "number", 0)),
        Task("single-word", "one key, its value a word", functools.partial(_single, "word", 0)),
        Task("single-uuid", "one key, its value a UUID", functools.partial(_single, "uuid", 0)),
        Task("multi-key", "16 keys with numbers, one asked for", functools.partial(_single, "number", 15)),
        Task("multi-value", "4 numbers of one key, all asked for", _multi_value),
        Task("multi-query", "4 keys with numbers, all asked for", _multi_query),
        Task("variables", "2 chains of 5 variables, the last of one to be resolved", _chains),
        Task("frequent-words", "a text of 100 made-up words, the 3 most frequent asked for", None),
    )
}


def make_problems(task: Task, tokens: int, count: int, tokenizer: Tokenizer, *, first: int = 0) -> list[Problem]:
    """Problems of a task whose prompts, tokenized, have up to `tokens` tokens, and nearly that many.

    Problem i hangs on its number first + i, the task and the length alone.

    Raises:
      ValueError: the facts do not fit into so many tokens.
    """
    return [_make_problem(task, tokens, tokenizer, number) for number in range(first, first + count)]


def _make_problem(task: Task, tokens: int, tokenizer: Tokenizer, number: int) -> Problem:
    seed = [SEED, list(TASKS).index(task.name), tokens, number]
    rng = np.random.default_rng(seed)
    if task.facts is None:
        text, fact = word_count_text(8 * tokens, rng)
        build = functools.partial(_end_with_question, text, fact)
    else:
        facts = task.facts(rng)
        fact = facts.asked
        build = functools.partial(hide, standard_library("test"), facts, [*seed, 1])
    return Problem(
        task=task.name,
        prompt=_longest_that_fits(build, tokens, tokenizer, task.name),
        answers=(fact.answer,),
        max_new_tokens=len(tokenizer.encode(f" {fact.answer}\n", add_special_tokens=False)) + SPARE_TOKENS,
        stop=("\n",),
        score=functools.partial(holds_all, values=fact.values),
    )


def hide(haystack: bytes, facts: Facts, seed: int | Sequence[int], size: int) -> str:
    """A text of `size` characters with every needle at a random line of it, and the question at its end.

    A seed gives the same places, as shares of the text, for every size.

    Raises:
      ValueError: the needles and the question are longer than that.
    """
    rng = np.random.default_rng(seed)
    placed = []
    for fact in (facts.asked, *facts.others):
        placed += zip(np.sort(rng.random(len(fact.needles))), fact.needles, strict=True)
    placed.sort()
    end = facts.asked.ask
    room = size - len(end) - sum(len(line) + 1 for _, line in placed)
    if room < 1:
        raise ValueError(f"the facts need more than {size - room} characters, size is {size}")
    text = excerpt(haystack, room, rng)[:-1].decode() + "\n"
    parts, begin = [], 0
    for place, line in placed:
        cut = max(text.rfind("\n", begin, int(place * room)) + 1, begin)
        parts += [text[begin:cut], line, "\n"]
        begin = cut
    return "".join([*parts, text[begin:], end])


def _end_with_question(text: bytes, fact: Fact, size: int) -> str:
    kept = size - len(fact.ask) - 1
    if kept < 1:
        raise ValueError(f"the question needs more than {size - kept} characters, size is {size}")
    return text[:kept].decode() + "\n" + fact.ask


def _longest_that_fits(build: Callable[[int], str], tokens: int, tokenizer: Tokenizer, name: str) -> str:
    """The text of up to `tokens` tokens that `build` makes of the largest size, or nearly the largest."""
    sample = standard_library("test")[:4096].decode()
    size = tokens * len(sample) // len(tokenizer.encode(sample))
    least = tokens - max(tokens // 100, 1)
    for _ in range(20):
        length = len(tokenizer.encode(build(size)))
        if least < length <= tokens:
            return build(size)
        size = size * (tokens - tokens // 200) // length
    raise ValueError(f"no text of task {name!r} has {least} to {tokens} tokens with this tokenizer")


def holds_all(reply: str, values: Sequence[str]) -> float:
    """1 where the reply has every value, whole, in whatever order; else 0."""
    return float(all(re.search(rf"\b{re.escape(value)}\b", reply) for value in values))
