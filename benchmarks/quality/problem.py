"""A problem of an evaluation set, and the files that such sets are published in: one JSON object a line."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt, and what a reply to it is worth.

    Attributes:
      task: name of the data set.
      prompt: text, without special tokens or a chat template.
      answers: the references; one is enough.
      max_new_tokens: tokens that a reply may have.
      stop: texts that end a reply, if any; see `cut_reply`.
      score: a reply, cut at `stop`, to its score in [0, 1].
      chat: chat models are asked through their chat template; otherwise they too continue the plain prompt.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    score: Callable[[str], float]
    chat: bool = True


def cut_reply(reply: str, stop: Sequence[str]) -> str:
    """The reply up to the first of the texts in `stop`, whichever comes first; all of it where none comes."""
    ends = [reply.index(text) for text in stop if text in reply]
    return reply[: min(ends, default=len(reply))]


def read_json_lines(path: Path, limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The objects in a file's lines, or in its first `limit` lines, each with its place to name in messages.

    Raises:
      ValueError: there is no such file, it is empty, a line does not hold a JSON object, or `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(itertools.islice(file, limit), start=1):
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place} is not valid JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{place} must hold a JSON object, got {type(record).__name__}")
            records.append((place, record))
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def text_field(record: dict[str, Any], name: str, place: str) -> str:
    """A field that must be a text.

    Raises:
      ValueError: it is missing or something else; the message begins with `place`.
    """
    text = record.get(name)
    if not isinstance(text, str):
        raise ValueError(f"{place}: {name} must be a text, got {text!r}")
    return text


def texts_field(record: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    """A field that must be a list of texts, of one at least.

    Raises:
      ValueError: it is missing or something else; the message begins with `place`.
    """
    texts = record.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: {name} must be a list of one or more texts, got {texts!r}")
    return tuple(texts)
