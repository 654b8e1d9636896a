"""LongBench: files, prompts and metrics."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import longbench
from benchmarks.quality.longbench import DATASETS
from benchmarks.quality.problem import Problem, cut_reply
from models.tokenizer import Tokenizer
from tests.checkpoints import write_tokenizer

CLASSES = ["Title", "Food", "Title of a person", "Date"]


def record(**fields: Any) -> dict[str, Any]:
    """A line of a data set as it is published."""
    return {
        "input": "Who wrote {it}?",
        "context": "Passage 1:\nA play by Ibsen.\n",
        "answers": ["Ibsen", "Henrik Ibsen"],
        "length": 12,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "8d0f5e",
    } | fields


def write(folder: Path, dataset: str, *lines: dict[str, Any] | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / f"{dataset}.jsonl").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return folder


def problem(folder: Path, dataset: str, **fields: Any) -> Problem:
    (only,) = longbench.load(write(folder, dataset, record(**fields)), [dataset])
    return only


def test_a_problem_is_a_line_in_the_published_prompt(tmp_path):
    got = problem(tmp_path, "hotpotqa")
    assert got.task == "hotpotqa"
    assert got.answers == ("Ibsen", "Henrik Ibsen")
    assert got.max_new_tokens == 32
    assert got.stop == ()
    assert got.prompt == (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nThe following are given passages.\nPassage 1:\nA play by Ibsen.\n\n\nAnswer the question based on the "
        "given passages. Only give me the answer and do not output any other words.\n\nQuestion: Who wrote {it}?"
        "\nAnswer:"
    )


def test_prompts_and_limits_are_those_published():
    """The digest is that of dataset2prompt.json and dataset2maxlen.json at THUDM/LongBench 2e00731."""
    published = {name: [DATASETS[name].template, DATASETS[name].max_new_tokens] for name in sorted(DATASETS)}
    digest = hashlib.sha256(json.dumps(published).encode()).hexdigest()
    assert digest == "8a4b0a5ab31cb3df77444f14343b2121ff23f0a89d11d20e648eab5068d171fa"


def test_few_shot_prompts_and_code_are_continued_without_a_chat():
    assert {name for name, dataset in DATASETS.items() if not dataset.chat} == {
        "trec",
        "triviaqa",
        "samsum",
        "lcc",
        "repobench-p",
    }


def test_all_data_sets_are_read_in_order_and_limit_is_for_each(tmp_path):
    for name in DATASETS:
        lines = [
            record(input=f"{name} {index}", answers=["Paragraph 2"], all_classes=["Paragraph 2"]) for index in range(3)
        ]
        write(tmp_path, name, *lines)
    problems = longbench.load(tmp_path)
    assert [each.task for each in problems] == [name for name in DATASETS for _ in range(3)]
    assert [each.task for each in longbench.load(tmp_path, limit=2)] == [name for name in DATASETS for _ in range(2)]
    first, second = longbench.load(tmp_path, ["trec", "lcc"], limit=1)
    assert (first.task, second.task) == ("trec", "lcc")
    assert first.prompt.endswith("\ntrec 0")


@pytest.mark.parametrize(
    ("dataset", "line", "message"),
    [
        ("qasper", '{"input": ', r"qasper.jsonl, line 2 is not valid JSON"),
        ("qasper", "", r"qasper.jsonl, line 2 is not valid JSON"),
        ("qasper", "[1]", r"qasper.jsonl, line 2 must hold a JSON object, got list"),
        ("qasper", record(input=None), r"qasper.jsonl, line 2: input must be a text, got None"),
        ("qasper", record(context=["a"]), r"qasper.jsonl, line 2: context must be a text, got \['a'\]"),
        ("qasper", record(answers="Ibsen"), r"line 2: answers must be a list of one or more texts, got 'Ibsen'"),
        ("qasper", record(answers=[]), r"line 2: answers must be a list of one or more texts, got \[\]"),
        ("qasper", record(answers=["a", 3]), r"line 2: answers must be a list of one or more texts, got \['a', 3\]"),
        ("qasper", {"input": "a", "context": "b"}, r"line 2: answers must be a list of one or more texts, got None"),
        ("trec", record(), r"trec.jsonl, line 2: all_classes must be a list of one or more texts, got None"),
        ("passage_retrieval_en", record(answers=["7"]), r"line 2: answers must be like \"Paragraph 1\", got \['7'\]"),
    ],
)
def test_refuses_lines_that_are_malformed(dataset, line, message, tmp_path):
    good = record(answers=["Paragraph 1"], all_classes=CLASSES)
    write(tmp_path, dataset, good, line)
    with pytest.raises(ValueError, match=message):
        longbench.load(tmp_path, [dataset])
    assert len(longbench.load(tmp_path, [dataset], limit=1)) == 1


def test_refuses_text_that_is_not_utf8(tmp_path):
    (tmp_path / "lcc.jsonl").write_bytes(json.dumps(record(context="é"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match="lcc.jsonl, line 1 is not valid JSON"):
        longbench.load(tmp_path, ["lcc"])


def test_refuses_files_that_are_missing_or_empty_and_bad_arguments(tmp_path):
    write(tmp_path, "qasper", record())
    with pytest.raises(ValueError, match=r"has no narrativeqa\.jsonl"):
        longbench.load(tmp_path)
    with pytest.raises(ValueError, match=r"datasets must be of narrativeqa, .*, repobench-p, got 'squad'"):
        longbench.load(tmp_path, ["qasper", "squad"])
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        longbench.load(tmp_path, ["qasper"], limit=0)
    with pytest.raises(ValueError, match=r"lcc\.jsonl is empty"):
        longbench.load(write(tmp_path, "lcc"), ["lcc"])


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Ibsen", 1),
        ("The Ibsen, HENRIK!", 1),
        # Of three words and of one: 2 * 1 / (3 + 1); of three words and of two: 2 * 2 / (3 + 2).
        ("it is Ibsen", 2 / 4),
        ("Henrik Johan Ibsen", 4 / 5),
        ("Ibsen Ibsen", 2 / 3),
        ("Strindberg", 0),
        ("", 0),
    ],
)
def test_qa_f1_counts_words_and_takes_the_best_answer(reply, score, tmp_path):
    assert problem(tmp_path, "hotpotqa").score(reply) == pytest.approx(score)


def test_normalization_removes_punctuation_before_articles():
    assert longbench.qa_f1("a-b the.end", "ab theend") == 1
    assert longbench.qa_f1("the", "the") == 0


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("the cat sat", "the cat sat", 1),
        # Longest common subsequence "the cat on mat": 4 of 5 words, and of 5.
        ("the cat on a mat", "the cat lay on mat", 4 / 5),
        # Union over the reply's sentences, "w1 w2" and "w1 w3 w5": 4 of its 8 different words, and of 5.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5)),
        ("The cat", "the cat", 1 / 2),
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("...", "cat", 0),
        ("cat", "", 0),
    ],
)
def test_rouge_l_is_that_of_the_summary(reply, answer, score):
    assert longbench.rouge_l(reply, answer) == pytest.approx(score, abs=1e-7)


def test_rouge_l_takes_replies_of_the_greatest_length_without_a_period():
    reply, answer = " ".join(f"a{i}" for i in range(512)), " ".join(f"b{i}" for i in range(300))
    assert longbench.rouge_l(reply, answer) == 0


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("Type: Food", "Food", 1),
        ("Food or Date", "Food", 1 / 2),
        ("Date", "Food", 0),
        ("food", "Food", 0),
        # "Title" is found in the reply as part of the right class, and is not held against it.
        ("Title of a person", "Title of a person", 1),
        ("Title of a person", "Title", 1 / 2),
        ("\n\nFood\nDate", "Food", 1),
        ("Date\nFood", "Food", 0),
    ],
)
def test_classification_shares_between_the_classes_on_the_first_line(reply, answer, score, tmp_path):
    assert problem(tmp_path, "trec", answers=[answer], all_classes=CLASSES).score(reply) == score


@pytest.mark.parametrize(
    ("dataset", "score"), [("triviaqa", 1), ("samsum", 1), ("hotpotqa", 2 / 3), ("gov_report", 2 / 3)]
)
def test_only_few_shot_replies_are_cut_to_their_first_line(dataset, score, tmp_path):
    assert problem(tmp_path, dataset, answers=["Ibsen"]).score("\nIbsen\nDialogue:") == pytest.approx(score)


@pytest.mark.parametrize(
    ("reply", "score"), [("12", 1), ("12 or 13", 1 / 2), ("12, 112 and 12", 2 / 3), ("twelve", 0), ("", 0)]
)
def test_count_is_the_share_of_right_numbers(reply, score, tmp_path):
    assert problem(tmp_path, "passage_count", answers=["12"]).score(reply) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Paragraph 7", 1), ("7", 1), ("Paragraph 17", 0), ("Paragraph 7, Paragraph 3", 1 / 2), ("", 0)],
)
def test_retrieval_is_the_share_of_right_numbers(reply, score, tmp_path):
    assert problem(tmp_path, "passage_retrieval_en", answers=["Paragraph 7"]).score(reply) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("return a + b", 1),
        ("\n\nreturn a + b\nreturn c", 1),
        ("```python\n# the sum\n// of both\nreturn a + b\n```", 1),
        # 11 of 12 characters on either side: 22 / 24, in whole percents.
        ("return a - b", 0.92),
        # Not the first line without a mark: an empty line is one.
        ("# the sum\n\nreturn a + b", 0),
        ("# the sum", 0),
        ("", 0),
    ],
)
def test_code_is_compared_by_its_first_line(reply, score, tmp_path):
    assert problem(tmp_path, "lcc", answers=["return a + b"]).score(reply) == score


def test_code_similarity_is_no_edit_distance():
    """The first of the longest common runs is matched, "t" or "i"; an edit distance would be the same both ways."""
    assert longbench.code_similarity("tide", "diet") == 0.25
    assert longbench.code_similarity("diet", "tide") == 0.5


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    """A token is a byte, and a text begins with one more."""
    return Tokenizer.from_folder(write_tokenizer(tmp_path))


def test_long_prompts_lose_their_middle(tokenizer):
    # Four tokens with the first special one: that and 3 bytes, and the last 4.
    assert longbench.cut_middle("abcdefghijklmnop", tokenizer, 8) == "abcmnop"
    assert longbench.cut_middle("abcdefghijklmnop", tokenizer, 9) == "abcmnop"


def test_prompts_that_fit_are_not_changed(tokenizer):
    assert longbench.cut_middle("abcdefg", tokenizer, 8) == "abcdefg"
    assert longbench.cut_middle("abcdef", tokenizer, 7) == "abcdef"
    assert longbench.cut_middle("abcdefgh", tokenizer, 8) == "abcefgh"


def test_refuses_to_cut_everything(tokenizer):
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        longbench.cut_middle("abc", tokenizer, 1)


@pytest.mark.parametrize(
    ("stop", "left"), [((), "one two three"), (("four",), "one two three"), (("three", "two"), "one "), (("one",), "")]
)
def test_a_reply_ends_at_the_first_of_the_texts(stop, left):
    assert cut_reply("one two three", stop) == left
