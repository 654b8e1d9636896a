"""LongBench v1 (Bai et al., arXiv 2308.14508): its 16 English data sets, with the published prompts and metrics.

Prompts, limits and metrics are those of THUDM/LongBench at commit 2e00731 (config/dataset2prompt.json and
dataset2maxlen.json, MIT licence, copyright 2023 THU-KEG & Zhipu AI; metrics.py and eval.py). The published score of a
data set is 100 times the mean over its problems. Long prompts are cut in the middle, see `cut_middle`.
"""

import collections
import dataclasses
import difflib
import functools
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rouge import Rouge

from benchmarks.quality.problem import Problem, read_json_lines, text_field, texts_field
from models.tokenizer import Tokenizer

PARAGRAPH = re.compile(r"Paragraph (\d+)")
_ROUGE_L: Any = Rouge(metrics=["rouge-l"], stats=["f"])


def qa_f1(reply: str, answer: str) -> float:
    """F1 of the words that reply and answer share, without case, punctuation and articles."""
    words, expected = _normalized_words(reply), _normalized_words(answer)
    shared = (collections.Counter(words) & collections.Counter(expected)).total()
    return 2 * shared / (len(words) + len(expected)) if shared else 0.0


def rouge_l(reply: str, answer: str) -> float:
    """F1 of summary-level ROUGE-L, as the package `rouge` defines it; 0 where a text has nothing but periods."""
    if not reply.strip(".") or not answer.strip("."):
        return 0.0
    return _ROUGE_L.get_scores(reply, answer, avg=True)["rouge-l"]["f"]


def classification(reply: str, answer: str, classes: Sequence[str]) -> float:
    """1 / n where the reply names n classes, the right one among them; else 0.

    A class whose name is part of the right one's is not counted.
    """
    named = [name for name in classes if name in reply and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def count(reply: str, answer: str) -> float:
    """The share of the numbers in the reply that are the answer."""
    numbers = re.findall(r"\d+", reply)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(reply: str, answer: str) -> float:
    """The share of the numbers in the reply that are N, for the answer "Paragraph N"."""
    return count(reply, PARAGRAPH.findall(answer)[0])


def code_similarity(reply: str, answer: str) -> float:
    """Similarity, in whole percents, of the answer and the reply's first line that has no comment or Markdown mark.

    It is difflib's ratio of matching characters, as `fuzz.ratio` of fuzzywuzzy is with the published requirements.
    """
    lines = reply.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, code, answer).ratio()) / 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """How a data set is asked and scored.

    Attributes:
      template: of the prompt, with {context} and {input}.
      max_new_tokens: tokens that a reply may have.
      metric: (reply, answer) to a score in [0, 1]; `classification` takes the classes besides.
      first_line: of the reply, only the first line that is not empty counts.
      chat: chat models are asked through their chat template; otherwise they too continue the plain prompt.
    """

    template: str
    max_new_tokens: int
    metric: Callable[..., float]
    first_line: bool = False
    chat: bool = True


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)

DATASETS = {
    "narrativeqa": Dataset(
        # "asconcisely" is what is published.
        template=(
            "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
            "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
            "Story: {context}\n\n"
            "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do "
            "not provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
        ),
        max_new_tokens=128,
        metric=qa_f1,
    ),
    "qasper": Dataset(
        template=(
            "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
            "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
            'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
            '"unanswerable". Do not provide any explanation.\n\n'
            "Article: {context}\n\n"
            " Answer the question based on the above article as concisely as you can, using a single phrase or "
            "sentence if possible. If the question cannot be answered based on the information in the article, write "
            '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not '
            "provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
        ),
        max_new_tokens=128,
        metric=qa_f1,
    ),
    "multifieldqa_en": Dataset(
        template=(
            "Read the following text and answer briefly.\n\n{context}\n\n"
            "Now, answer the following question based on the above text, only give me the answer and do not output any "
            "other words.\n\nQuestion: {input}\nAnswer:"
        ),
        max_new_tokens=64,
        metric=qa_f1,
    ),
    "hotpotqa": Dataset(template=_PASSAGES, max_new_tokens=32, metric=qa_f1),
    "2wikimqa": Dataset(template=_PASSAGES, max_new_tokens=32, metric=qa_f1),
    "musique": Dataset(template=_PASSAGES, max_new_tokens=32, metric=qa_f1),
    "gov_report": Dataset(
        template=(
            "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
            "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:"
        ),
        max_new_tokens=512,
        metric=rouge_l,
    ),
    "qmsum": Dataset(
        template=(
            "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
            "one or more sentences.\n\nTranscript:\n{context}\n\n"
            "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n"
            "Query: {input}\nAnswer:"
        ),
        max_new_tokens=512,
        metric=rouge_l,
    ),
    "multi_news": Dataset(
        template=(
            "You are given several news passages. Write a one-page summary of all news. \n\n"
            "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:"
        ),
        max_new_tokens=512,
        metric=rouge_l,
    ),
    "trec": Dataset(
        template=(
            "Please determine the type of the question below. Here are some examples of questions.\n\n"
            "{context}\n{input}"
        ),
        max_new_tokens=64,
        metric=classification,
        first_line=True,
        chat=False,
    ),
    "triviaqa": Dataset(
        template=(
            "Answer the question based on the given passage. Only give me the answer and do not output any other "
            "words. The following are some examples.\n\n{context}\n\n{input}"
        ),
        max_new_tokens=32,
        metric=qa_f1,
        first_line=True,
        chat=False,
    ),
    "samsum": Dataset(
        template=(
            "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
            "{context}\n\n{input}"
        ),
        max_new_tokens=128,
        metric=rouge_l,
        first_line=True,
        chat=False,
    ),
    "passage_count": Dataset(
        template=(
            "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
            "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
            "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n"
            "Please enter the final count of unique paragraphs after removing duplicates. The output format should "
            "only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: "
        ),
        max_new_tokens=32,
        metric=count,
    ),
    "passage_retrieval_en": Dataset(
        template=(
            "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
            "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n"
            "Please enter the number of the paragraph that the abstract is from. The answer format must be like "
            '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
        ),
        max_new_tokens=32,
        metric=retrieval,
    ),
    "lcc": Dataset(
        template="Please complete the code given below. \n{context}Next line of code:\n",
        max_new_tokens=64,
        metric=code_similarity,
        chat=False,
    ),
    "repobench-p": Dataset(
        template="Please complete the code given below. \n{context}{input}Next line of code:\n",
        max_new_tokens=64,
        metric=code_similarity,
        chat=False,
    ),
}


def load(folder: Path, datasets: Sequence[str] | None = None, limit: int | None = None) -> list[Problem]:
    """The problems of `datasets` (by default all 16), or the first `limit` of each.

    Args:
      folder: holds <dataset>.jsonl, as the published data.zip does in its folder data.

    Raises:
      ValueError: a file is missing or malformed (the message names file and line), a data set is unknown, or `limit`
        is not positive.
    """
    names = tuple(DATASETS) if datasets is None else tuple(datasets)
    for name in names:
        if name not in DATASETS:
            raise ValueError(f"datasets must be of {', '.join(DATASETS)}, got {name!r}")
    return [
        _as_problem(name, record, place)
        for name in names
        for place, record in read_json_lines(folder / f"{name}.jsonl", limit)
    ]


def cut_middle(prompt: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """The prompt without its middle, as text, where it has more than `max_tokens` tokens.

    The first and the last max_tokens // 2 tokens are kept, special ones left out. Encoded anew, the text may have a few
    tokens more or less, and a chat template adds some: leave room for them and for the reply.

    Raises:
      ValueError: `max_tokens` is less than 2.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    ids = tokenizer.encode(prompt)
    if len(ids) <= max_tokens:
        return prompt
    half = max_tokens // 2
    return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


def _as_problem(name: str, record: dict[str, Any], place: str) -> Problem:
    dataset = DATASETS[name]
    answers = texts_field(record, "answers", place)
    metric = dataset.metric
    if metric is retrieval and not all(PARAGRAPH.search(answer) for answer in answers):
        raise ValueError(f'{place}: answers must be like "Paragraph 1", got {list(answers)}')
    if metric is classification:
        metric = functools.partial(classification, classes=texts_field(record, "all_classes", place))
    return Problem(
        task=name,
        prompt=dataset.template.format(
            context=text_field(record, "context", place), input=text_field(record, "input", place)
        ),
        answers=answers,
        max_new_tokens=dataset.max_new_tokens,
        stop=(),
        score=functools.partial(_best_score, answers=answers, metric=metric, first_line=dataset.first_line),
        chat=dataset.chat,
    )


def _best_score(reply: str, answers: Sequence[str], metric: Callable[[str, str], float], first_line: bool) -> float:
    """The score by the answer that suits the reply best."""
    if first_line:
        reply = reply.lstrip("\n").split("\n")[0]
    return max(metric(reply, answer) for answer in answers)


def _normalized_words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
