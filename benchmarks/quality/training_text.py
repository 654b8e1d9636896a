"""Training sequences: real text with facts in it, and questions about them near and far.

A task asks one question, at its end. A training sequence asks many, at random places behind their needles, so that
almost every step of the model's attention at every distance is trained by it.
"""

import dataclasses

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
from benchmarks.quality.haystack import excerpt
from benchmarks.quality.word_counts import word_count_text

KINDS = ("single", "multi_value", "multi_query", "chain")
KIND_SHARES = (0.36, 0.28, 0.16, 0.2)
VALUE_SHARES = (0.5, 0.3, 0.2)
ASKED_SHARE = 0.75
AT_END_SHARE = 0.4
WORD_COUNT_SHARE = 0.12


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the text: its bytes, where it wants to stand in [0, 1], and which of its bytes are an answer."""

    place: float
    text: bytes
    answer_from: int


def training_sequence(haystack: bytes, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A text of `size` bytes: uint8 [size], and bool [size], True where a byte belongs to an answer."""
    if rng.random() < WORD_COUNT_SHARE and size >= 512:
        text, fact = word_count_text(size, rng)
        end = _question(fact, 1.0)
        pieces = [Piece(0.0, _ended(text[: size - len(end.text)]), -1), end]
    else:
        pieces = _mixed(haystack, size, rng)
    text = b"".join(piece.text for piece in pieces)
    is_answer = np.zeros(len(text), bool)
    offset = 0
    for piece in pieces:
        if piece.answer_from >= 0:
            is_answer[offset + piece.answer_from : offset + len(piece.text)] = True
        offset += len(piece.text)
    return np.frombuffer(text, np.uint8)[:size], is_answer[:size]


def _mixed(haystack: bytes, size: int, rng: np.random.Generator) -> list[Piece]:
    """Facts, questions and text, in order."""
    room = size * rng.uniform(0.1, 0.7 if size <= 1024 else 0.45)
    # With chance, all facts of a text are of one kind, as in the tasks.
    kind = str(rng.choice(KINDS, p=KIND_SHARES)) if rng.random() < 0.3 else None
    value_kind = str(rng.choice(list(VALUES), p=VALUE_SHARES)) if rng.random() < 0.3 else None
    pieces, used = [], 0
    while True:
        new = _fact_pieces(_random_fact(kind, value_kind, size, rng), rng)
        length = sum(len(piece.text) for piece in new)
        if used + length > (size if not pieces else room):
            if pieces or length > size:
                break
        pieces += new
        used += length
    pieces.sort(key=lambda piece: piece.place)
    return _interleave(_ended(excerpt(haystack, size - used, rng)), pieces)


def _random_fact(kind: str | None, value_kind: str | None, size: int, rng: np.random.Generator) -> Fact:
    if size <= 256:
        kind, value_kind = "single", value_kind if value_kind != "uuid" else "number"
    kind = kind or str(rng.choice(KINDS, p=KIND_SHARES))
    value_kind = value_kind or str(rng.choice(list(VALUES), p=VALUE_SHARES))
    value = VALUES[value_kind]
    if kind == "single":
        return single(value_kind, random_key(rng), value(rng))
    if kind == "chain":
        return chain(distinct(random_variable, int(rng.integers(1, 6)), rng), random_number(rng))
    count = int(rng.integers(2, 5))
    if kind == "multi_value":
        return multi_value(value_kind, random_key(rng), distinct(value, count, rng))
    return multi_query(value_kind, [(key, value(rng)) for key in distinct(random_key, count, rng)])


def _fact_pieces(fact: Fact, rng: np.random.Generator) -> list[Piece]:
    places = np.sort(rng.random(len(fact.needles)))
    pieces = [Piece(float(place), line.encode() + b"\n", -1) for place, line in zip(places, fact.needles, strict=True)]
    if rng.random() < ASKED_SHARE:
        at_end = rng.random() < AT_END_SHARE
        pieces.append(_question(fact, 1.0 if at_end else float(rng.uniform(places[-1], 1.0))))
    return pieces


def _question(fact: Fact, place: float) -> Piece:
    ask = fact.ask.encode()
    return Piece(place, ask + f" {fact.answer}\n".encode(), len(ask))


def _interleave(text: bytes, pieces: list[Piece]) -> list[Piece]:
    """The pieces with the text between them, cut where lines end."""
    whole, begin = [], 0
    for piece in pieces:
        cut = max(text.rfind(b"\n", begin, int(piece.place * len(text))) + 1, begin)
        if piece.place == 1.0:
            cut = len(text)
        whole += [Piece(piece.place, text[begin:cut], -1), piece]
        begin = cut
    return [*whole, Piece(1.0, text[begin:], -1)]


def _ended(text: bytes) -> bytes:
    """The text with a line end for its last byte."""
    return text[:-1] + b"\n" if text else text
