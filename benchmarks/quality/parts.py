"""What one process evaluates at a time."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.quality import gsm8k, longbench
from benchmarks.quality.evaluate import Known, answer, compare, probe, summarize
from benchmarks.quality.haystack import standard_library
from benchmarks.quality.problem import Problem
from benchmarks.quality.tasks import TASKS, make_problems
from models import Tokenizer, load_pretrained
from rabitq_jax import RaBitQConfig
from rabitq_jax.selectors import Selector
from rabitq_jax.selectors.arguments import parse_selector

TEXT_PIECES, TEXT_NEW_TOKENS = 8, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one process evaluates at a time: problems with prompts of up to so many tokens, in several ways.

    Attributes:
      configs: dense (None), and RaBitQ.
      methods: other ways to decode, as `parse_selector` reads them.
      source: "tasks", or the format of the files in `folder`: "longbench" or "gsm8k".
      probes: problems of each task whose attention is measured; 0 measures none.
      repeats_dense: another part has the rows of dense decoding, which is here for what is compared with it.
    """

    model: str
    dtype: str
    configs: tuple[RaBitQConfig | None, ...]
    chat: bool
    examples: int
    methods: tuple[str, ...] = ()
    source: str = "tasks"
    tasks: tuple[str, ...] = ()
    tokens: int = 0
    probes: int = 0
    folder: Path | None = None
    repeats_dense: bool = False

    @property
    def ways(self) -> list[tuple[dict, RaBitQConfig | Selector | None]]:
        """Every way of decoding: what stands in its rows, and its configuration."""
        own = [({"top_p": config and config.top_p}, config) for config in self.configs]
        return [*own, *(({"top_p": None, "method": method}, parse_selector(method)) for method in self.methods)]

    @property
    def first_way(self) -> int:
        """Where those ways begin that this part has rows of."""
        return int(self.repeats_dense)

    def split(self, count: int) -> list["Part"]:
        """Up to `count` parts, each with some of the ways, in order."""
        dense, *others = [*self.configs, *self.methods]
        assert dense is None
        bounds = [i * len(others) // count for i in range(count + 1)]
        shares = [others[low:high] for low, high in itertools.pairwise(bounds) if low < high] or [[]]
        return [
            dataclasses.replace(
                self,
                configs=(None, *(way for way in share if not isinstance(way, str))),
                methods=tuple(way for way in share if isinstance(way, str)),
                repeats_dense=i > 0,
            )
            for i, share in enumerate(shares)
        ]


def evaluate_part(part: Part) -> tuple[list[dict], list[dict]]:
    """A row for each task and way of decoding: answers, and what they read; and rows of what attention captures."""
    decoder, tokenizer = load_pretrained(part.model, dtype=jnp.dtype(part.dtype))
    tokens, problems = load_problems(part, tokenizer)
    about, configs = zip(*part.ways[part.first_way :], strict=True)
    with tqdm(total=len(problems) * len(configs), desc=f"answers, {tokens} tokens", unit="reply") as bar:
        answered = answer(
            decoder, tokenizer, problems, configs, key=jax.random.key(0), chat=part.chat, advance=bar.update
        )
    _forget_programs()
    rows = [
        {"tokens": tokens, **way, **row}
        for way, replies in zip(about, answered, strict=True)
        for row in summarize(replies)
    ]
    return rows, probe_rows(decoder, tokenizer, part, problems) if part.probes else []


def load_problems(part: Part, tokenizer: Tokenizer) -> tuple[int, list[Problem]]:
    """A bound on the prompts' tokens, and the problems."""
    if part.source == "tasks":
        make = functools.partial(make_problems, tokens=part.tokens, count=part.examples, tokenizer=tokenizer)
        return part.tokens, [problem for task in part.tasks for problem in make(TASKS[task])]
    if part.source == "gsm8k":
        problems = gsm8k.load(part.folder, limit=part.examples)
        return max(len(tokenizer.encode(problem.prompt)) for problem in problems), problems
    problems = longbench.load(part.folder, limit=part.examples)
    room = part.tokens - max(problem.max_new_tokens for problem in problems)
    cut = lambda problem: longbench.cut_middle(problem.prompt, tokenizer, room)  # noqa: E731
    return room, [dataclasses.replace(problem, prompt=cut(problem)) for problem in problems]


def probe_rows(decoder, tokenizer, part: Part, problems: Sequence[Problem]) -> list[dict]:
    """What decoding the known answers, and plain text, attends: a row for each set of texts and way of decoding."""
    by_task: dict[str, list[Problem]] = {}
    for problem in problems:
        by_task.setdefault(problem.task, []).append(problem)
    chosen = [problem for group in by_task.values() for problem in group[: part.probes]]
    text = standard_library("test").decode()
    sets = {
        "answers": Known.answers(tokenizer, chosen),
        "text": Known.plain(tokenizer, text, part.tokens, TEXT_NEW_TOKENS, TEXT_PIECES),
    }
    about, configs = zip(*part.ways, strict=True)
    rows = []
    for name, known in sets.items():
        passes = probe(decoder, known, configs, key=jax.random.key(1), progress=True)
        for way, run in list(zip(about, passes, strict=True))[part.first_way :]:
            rows.append({"tokens": part.tokens, "texts": name, **way, **compare(run, passes[configs.index(None)])})
        _forget_programs()
    return rows


def _forget_programs() -> None:
    """Programs of many configurations, all kept, take more memory maps than a process may have, and on a CPU end it."""
    jax.clear_caches()
