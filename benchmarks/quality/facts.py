"""Facts to hide in a text, and questions about them, in the manner of RULER (arXiv 2404.06654).

A fact is one or several lines ("needles"), a question, and the answer that it wants, which is one line. Every task is
made of these kinds; what differs is how many facts share a text, and which are asked for.
"""

import dataclasses
import uuid
from collections.abc import Callable, Sequence

import numpy as np

CONSONANTS, VOWELS = list("bcdfghjklmnprstvwz"), list("aeiou")
LETTERS, DIGITS = list("abcdefghijklmnopqrstuvwxyz"), list("0123456789")
CAPITALS = [letter.upper() for letter in LETTERS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """Lines to hide, in this order, and what to ask about them.

    Attributes:
      needles: lines without their ends.
      question: a line.
      answer: a line, what a model trained on these facts replies.
      values: what any good reply contains.
    """

    needles: tuple[str, ...]
    question: str
    answer: str
    values: tuple[str, ...]

    @property
    def ask(self) -> str:
        """The end of a prompt."""
        return f"Question: {self.question}\nAnswer:"


def needle(kind: str, key: str, value: str) -> str:
    return f"The special {kind} for {key} is {value}."


def single(kind: str, key: str, value: str) -> Fact:
    """One value of one key."""
    return Fact(
        needles=(needle(kind, key, value),),
        question=f"What is the special {kind} for {key}?",
        answer=value,
        values=(value,),
    )


def multi_value(kind: str, key: str, values: Sequence[str]) -> Fact:
    """All values of one key, in the order in which they stand in the text."""
    return Fact(
        needles=tuple(needle(kind, key, value) for value in values),
        question=f"What are all the special {kind}s for {key}?",
        answer=", ".join(values),
        values=tuple(values),
    )


def multi_query(kind: str, pairs: Sequence[tuple[str, str]]) -> Fact:
    """The values of several keys, asked for at once."""
    keys = [key for key, _ in pairs]
    return Fact(
        needles=tuple(needle(kind, key, value) for key, value in pairs),
        question=f"What are the special {kind}s for {', '.join(keys[:-1])} and {keys[-1]}?",
        answer=", ".join(f"{key}: {value}" for key, value in pairs),
        values=tuple(value for _, value in pairs),
    )


def chain(names: Sequence[str], value: str) -> Fact:
    """A chain of assignments; the last variable is asked for, and resolved step by step.

    RULER asks the other way round, for every variable that holds a value.
    """
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before}" for before, name in zip(names, names[1:], strict=False)]
    return Fact(
        needles=tuple(lines),
        question=f"What is the value of VAR {names[-1]}?",
        answer=" = ".join([*reversed(names), value]),
        values=(value,),
    )


def random_number(rng: np.random.Generator) -> str:
    return str(rng.integers(10**6, 10**7))


def random_word(rng: np.random.Generator) -> str:
    syllables = rng.integers(2, 5)
    word = "".join(a + b for a, b in zip(rng.choice(CONSONANTS, syllables), rng.choice(VOWELS, syllables), strict=True))
    return word + (str(rng.choice(CONSONANTS)) if rng.random() < 0.5 else "")


def random_uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


VALUES: dict[str, Callable[[np.random.Generator], str]] = {
    "number": random_number,
    "word": random_word,
    "uuid": random_uuid,
}


def random_key(rng: np.random.Generator) -> str:
    """A name of one of many forms, so that a model cannot count on one."""
    form = rng.integers(4)
    if form == 0:
        return "-".join(_random_words(rng, 2, 3))
    if form == 1:
        return random_word(rng).capitalize()
    if form == 2:
        return "".join(rng.choice(LETTERS + DIGITS, rng.integers(4, 11)))
    article = "the " if rng.random() < 0.3 else ""
    return article + " ".join(_random_words(rng, 1, 4))


def _random_words(rng: np.random.Generator, least: int, most: int) -> list[str]:
    return [random_word(rng) for _ in range(rng.integers(least, most + 1))]


def random_variable(rng: np.random.Generator) -> str:
    return "".join(rng.choice(CAPITALS, 5))


def distinct(make: Callable[[np.random.Generator], str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` different texts."""
    made: dict[str, None] = {}
    while len(made) < count:
        made[make(rng)] = None
    return list(made)
