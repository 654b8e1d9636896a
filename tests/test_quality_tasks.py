"""Facts, tasks and training text: what a problem must hold, and that it hangs on its seed alone."""

import re

import numpy as np
import pytest

from benchmarks.byte_tokenizer import ascii_ids, byte_tokenizer
from benchmarks.quality import facts, haystack, tasks, training_text
from benchmarks.quality.word_counts import word_count_text
from models import Tokenizer
from tests.checkpoints import write_tokenizer

SIZES = (1024, 3000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_haystack_splits_share_no_module():
    train, test = haystack.standard_library("train"), haystack.standard_library("test")
    assert min(len(train), len(test)) > 100_000
    lines = [{line for line in text.split(b"\n") if len(line) > 80} for text in (train, test)]
    # Idioms, and lines that one module took from another, stand in both.
    assert len(lines[0] & lines[1]) < 0.05 * len(lines[1])
    assert all(32 <= byte < 127 or byte == 10 for byte in set(train) | set(test))


def test_excerpt_begins_with_a_line_and_repeats_a_short_text():
    text = b"first line\nsecond line\nthird\n"
    for seed in range(20):
        piece = haystack.excerpt(text, 12, np.random.default_rng(seed))
        assert len(piece) == 12 and (b"\n" + piece)[:5] in b"\n" + text
    assert haystack.excerpt(text, 70, np.random.default_rng(0)) == (text * 3)[:70]


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompt_fills_its_tokens_and_ends_with_the_question(name, tokens, tokenizer):
    for problem in tasks.make_problems(tasks.TASKS[name], tokens, 3, tokenizer):
        assert 0.99 * tokens - 1 < len(tokenizer.encode(problem.prompt)) <= tokens
        assert re.search(r"\nQuestion: .*\?\nAnswer:$", problem.prompt)
        assert problem.score(f" {problem.answers[0]}\n") == 1
        assert problem.max_new_tokens > len(problem.answers[0]) + 1


@pytest.mark.parametrize("name", [name for name, task in tasks.TASKS.items() if task.facts])
def test_every_needle_stands_on_a_line_once_and_in_order(name):
    task_facts = tasks.TASKS[name].facts(np.random.default_rng(3))
    text = tasks.hide(haystack.standard_library("test"), task_facts, 7, 4000)
    lines = text.split("\n")
    assert len(text) == 4000
    for fact in (task_facts.asked, *task_facts.others):
        places = [lines.index(line) for line in fact.needles]
        assert places == sorted(places) and all(lines.count(line) == 1 for line in fact.needles)
    assert text.endswith(task_facts.asked.ask)


def test_problems_hang_on_task_length_and_number(tokenizer):
    task = tasks.TASKS["multi-key"]
    first = tasks.make_problems(task, 1024, 4, tokenizer)
    assert [p.prompt for p in first[2:]] == [p.prompt for p in tasks.make_problems(task, 1024, 2, tokenizer, first=2)]
    assert len({p.prompt for p in first}) == 4
    assert first[0].answers != tasks.make_problems(task, 1025, 1, tokenizer)[0].answers


@pytest.mark.parametrize("name", ["multi-key", "frequent-words"])
def test_facts_that_do_not_fit_are_refused(name, tokenizer):
    with pytest.raises(ValueError, match="characters, size is"):
        tasks.make_problems(tasks.TASKS[name], 40, 1, tokenizer)


@pytest.mark.parametrize(
    "reply, score", [(" 123, 45", 1.0), ("45 and 123.", 1.0), ("123", 0.0), ("1234, 45", 0.0), ("a123, 45", 0.0)]
)
def test_score_wants_every_value_whole(reply, score):
    assert tasks.holds_all(reply, ("123", "45")) == score


def test_chain_resolves_backwards():
    fact = facts.chain(["AAAAA", "BBBBB", "CCCCC"], "1234567")
    assert fact.needles == ("VAR AAAAA = 1234567", "VAR BBBBB = VAR AAAAA", "VAR CCCCC = VAR BBBBB")
    assert fact.ask == "Question: What is the value of VAR CCCCC?\nAnswer:"
    assert fact.answer == "CCCCC = BBBBB = AAAAA = 1234567"


def test_frequent_words_are_those_that_come_up_most():
    text, fact = word_count_text(20_000, np.random.default_rng(1))
    words, counts = np.unique(text.split()[:-1], return_counts=True)
    most = words[np.argsort(-counts, stable=True)][:3]
    # The text is cut after the words were counted: the third may have changed places with the fourth, the first not.
    assert fact.values[0] == most[0].decode()
    assert set(fact.values) & {word.decode() for word in most} >= set(fact.values[:2])


@pytest.mark.parametrize("size", [200, 512, 4096])
def test_training_sequence_marks_its_answers(size):
    text_of_library = haystack.standard_library("train")
    marked = 0
    for seed in range(30):
        text, is_answer = training_text.training_sequence(text_of_library, size, np.random.default_rng(seed))
        assert text.shape == is_answer.shape == (size,)
        whole = bytes(text).decode()
        for begin in np.flatnonzero(np.diff(np.pad(is_answer, (1, 0)).astype(int)) == 1):
            end = begin + int(np.argmin(np.pad(is_answer[begin:], (0, 1))))
            question = re.search(r"(?:^|\n)Question: ([^\n]*)\?\nAnswer:$", whole[:begin])
            assert question and whole[begin] == " " and whole[end - 1] == "\n"
            reply = whole[begin:end].strip()
            if match := re.fullmatch(r"What is the special \w+ for (.*)", question[1]):
                assert re.search(rf"The special \w+ for {re.escape(match[1])} is {re.escape(reply)}\.\n", whole[:begin])
            marked += 1
    assert marked > 10


def test_training_sequences_hang_on_their_seed():
    text = haystack.standard_library("train")
    first, again, other = (
        training_text.training_sequence(text, 600, np.random.default_rng(seed))[0] for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_ascii_ids_are_the_tokenizers():
    begin, ids = ascii_ids()
    assert byte_tokenizer().encode("a\nZ").ids == [begin, *ids[[97, 10, 90]]]
