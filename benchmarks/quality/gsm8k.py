"""GSM8K (Cobbe et al., arXiv 2110.14168): grade school math, a few solved problems in the prompt.

The folder holds the published train.jsonl and test.jsonl. The calculator annotations in the answers (<<2*3=6>>) stay.
"""

import decimal
import functools
import re
from pathlib import Path

from benchmarks.quality.problem import Problem, read_json_lines, text_field

# The set names no limit; this is what lm-evaluation-harness generates by default.
MAX_NEW_TOKENS = 256
# A minus behind a letter or digit is a dash or a subtraction.
NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def load(folder: Path, limit: int | None = None, shots: int = 8) -> list[Problem]:
    """The problems of test.jsonl, or its first `limit`; before each stand the first `shots` of train.jsonl, solved.

    Raises:
      ValueError: a file is missing or malformed or has too few problems (the message names file and line), or `limit`
        or `shots` is out of range.
    """
    if shots < 0:
        raise ValueError(f"shots must be at least 0, got {shots}")
    solved = _read_solved(folder / "train.jsonl", shots) if shots else []
    problems = []
    for place, record in read_json_lines(folder / "test.jsonl", limit):
        answer = _final_number(text_field(record, "answer", place), place)
        problems.append(
            Problem(
                task="gsm8k",
                prompt="\n\n".join([*solved, f"Question: {text_field(record, 'question', place)}\nAnswer:"]),
                answers=(answer,),
                max_new_tokens=MAX_NEW_TOKENS,
                stop=("Question:",),
                score=functools.partial(exact_match, answer=answer),
            )
        )
    return problems


def exact_match(reply: str, answer: str) -> float:
    """1 where the last number in the reply is that of the answer, else 0. "$1,200.00." is the number 1200."""
    numbers = NUMBER.findall(reply)
    return float(bool(numbers) and _value(numbers[-1]) == _value(answer))


def _read_solved(path: Path, shots: int) -> list[str]:
    """The first problems of a file with their answers, as they stand in a prompt."""
    solved = []
    for place, record in read_json_lines(path, shots):
        question, answer = text_field(record, "question", place), text_field(record, "answer", place)
        _final_number(answer, place)
        solved.append(f"Question: {question}\nAnswer: {answer}")
    if len(solved) < shots:
        raise ValueError(f"{path} has {len(solved)} problems, but shots is {shots}")
    return solved


def _final_number(answer: str, place: str) -> str:
    """The number behind "####", at the end of a published answer."""
    _, mark, number = answer.rpartition("####")
    if not mark or not NUMBER.fullmatch(number.strip()):
        raise ValueError(f"{place}: answer must end in #### and a number, got {answer!r}")
    return number.strip()


def _value(number: str) -> decimal.Decimal:
    return decimal.Decimal(number.replace("$", "").replace(",", ""))
