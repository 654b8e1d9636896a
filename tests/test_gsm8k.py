"""GSM8K: files, prompts and the metric."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import gsm8k
from benchmarks.quality.problem import cut_reply


def record(index: int, answer: str | None = None) -> dict[str, str]:
    """A line as it is published."""
    solution = f"{index} and {index} are <<{index}+{index}={2 * index}>>{2 * index} apples.\n#### {2 * index}"
    return {"question": f"Two times {index} apples?", "answer": solution if answer is None else answer}


def write(folder: Path, name: str, *lines: dict[str, str] | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path, "train.jsonl", *map(record, range(10)))
    return write(tmp_path, "test.jsonl", record(20), record(600, "Many.\n#### 1,200"))


def test_a_prompt_is_solved_problems_and_an_open_one(folder):
    first, second = gsm8k.load(folder, shots=2)
    assert first.task == second.task == "gsm8k"
    assert first.prompt == (
        "Question: Two times 0 apples?\nAnswer: 0 and 0 are <<0+0=0>>0 apples.\n#### 0\n\n"
        "Question: Two times 1 apples?\nAnswer: 1 and 1 are <<1+1=2>>2 apples.\n#### 2\n\n"
        "Question: Two times 20 apples?\nAnswer:"
    )
    assert (first.answers, second.answers) == (("40",), ("1,200",))
    assert first.max_new_tokens == 256


def test_eight_problems_are_solved_by_default(folder):
    (only,) = gsm8k.load(folder, limit=1)
    assert [only.prompt.count(f"Two times {index} apples?") for index in range(10)] == [1] * 8 + [0] * 2


def test_without_shots_the_training_file_is_not_read(folder):
    (folder / "train.jsonl").unlink()
    first, _ = gsm8k.load(folder, shots=0)
    assert first.prompt == "Question: Two times 20 apples?\nAnswer:"


def test_a_reply_ends_where_the_next_question_begins(folder):
    first, _ = gsm8k.load(folder)
    reply = " 40.\n#### 40\n\nQuestion: Two times 7 apples?\nAnswer: 14"
    assert first.score(reply) == 0
    assert first.score(cut_reply(reply, first.stop)) == 1


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("#### 42", "42", 1),
        ("First 7, then 42.", "42", 1),
        ("42, not 7", "42", 0),
        ("It costs $1,200.", "1200", 1),
        ("It costs $1,200.00.", "1,200", 1),
        ("1200", "1,200", 1),
        ("142", "42", 0),
        ("4.2", "42", 0),
        ("so x = -5", "-5", 1),
        ("a loss of -$5", "-5", 1),
        ("5", "-5", 0),
        # Neither a dash nor a subtraction makes a number negative.
        ("between 3-5", "5", 1),
        ("half is .5", "0.5", 1),
        ("half is 0.50.", "0.5", 1),
        ("forty-two", "42", 0),
        ("", "42", 0),
        ("$,.", "42", 0),
    ],
)
def test_the_last_number_counts(reply, answer, score):
    assert gsm8k.exact_match(reply, answer) == score


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ('"text"', "line 2 must hold a JSON object, got str"),
        ({"answer": "#### 1"}, "line 2: question must be a text, got None"),
        ({"question": "How many?"}, "line 2: answer must be a text, got None"),
        (record(1, "It is 42."), "line 2: answer must end in #### and a number, got 'It is 42.'"),
        (record(1, "42"), "line 2: answer must end in #### and a number"),
        (record(1, "#### 42 apples"), "line 2: answer must end in #### and a number"),
        (record(1, "####"), "line 2: answer must end in #### and a number"),
    ],
)
def test_refuses_lines_that_are_malformed(line, message, name, folder):
    write(folder, name, record(1), line)
    with pytest.raises(ValueError, match=f"{name}, {message}"):
        gsm8k.load(folder, shots=2)


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_refuses_files_that_are_missing_or_empty(name, folder):
    write(folder, name)
    with pytest.raises(ValueError, match=f"{name} is empty"):
        gsm8k.load(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        gsm8k.load(folder)


def test_refuses_more_shots_than_there_are_and_bad_arguments(folder):
    with pytest.raises(ValueError, match=r"train\.jsonl has 10 problems, but shots is 11"):
        gsm8k.load(folder, shots=11)
    with pytest.raises(ValueError, match="shots must be at least 0, got -1"):
        gsm8k.load(folder, shots=-1)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        gsm8k.load(folder, limit=0)
