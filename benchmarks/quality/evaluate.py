"""How well a model answers problems with several ways of decoding, and what it reads for that."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from benchmarks.quality.prefilled import Prefilled
from benchmarks.quality.problem import Problem, cut_reply
from benchmarks.quality.teacher_forcing import Pass, teacher_forced
from models import Tokenizer
from rabitq_jax import Generation, RaBitQConfig, generate
from rabitq_jax.cache import round_capacity
from rabitq_jax.generation import Decoder
from rabitq_jax.selectors import Selector

# Prompt tokens of a batch, and sequences at most.
BATCH_TOKENS, BATCH_MAX = 131072, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """A reply and what decoding it attended and read: shares [L,K] and [], means over its tokens."""

    problem: Problem
    reply: str
    score: float
    kept: np.ndarray
    bytes_read: float


def answer(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    configs: Sequence[RaBitQConfig | Selector | None],
    *,
    key: jax.Array,
    chat: bool = False,
    advance: Callable[[int], object] = lambda replies: None,
) -> list[list[Answered]]:
    """Greedy replies to problems under each configuration, in the problems' order. A prompt is read once for all.

    Args:
      configs: None decodes densely.
      chat: send prompts as a user's message, by the checkpoint's chat template.
      advance: told the number of new replies, for a progress bar.
    """
    new_tokens = max(problem.max_new_tokens for problem in problems)
    prompts = [encode(tokenizer, problem, chat=chat) for problem in problems]
    longest = max(map(len, prompts))
    capacity = capacity_for(longest + new_tokens, configs)
    ends = stop_tokens(tokenizer, problems)
    answered: list[list[Answered]] = [[] for _ in configs]
    for first, part in batches(list(zip(problems, prompts, strict=True)), longest):
        prefilled = Prefilled(model, [prompt for _, prompt in part], capacity)
        new = min(len(problems) - first, len(part))
        for replies, config in zip(answered, configs, strict=True):
            out = generate(
                model, prefilled.last[:, None], config, max_new_tokens=new_tokens, cache=prefilled.start(config),
                key=jax.random.fold_in(key, first), eos_token_ids=ends,
            )  # fmt: skip
            replies += [_answered(tokenizer, problem, out, i) for i, (problem, _) in enumerate(part[:new])]
            advance(new)
    return answered


def _answered(tokenizer: Tokenizer, problem: Problem, out: Generation, i: int) -> Answered:
    """Sequence i of a batch as the reply to its problem."""
    steps = slice(0, min(int(out.lengths[i]), problem.max_new_tokens))
    reply = cut_reply(tokenizer.decode(out.tokens[i, steps]), problem.stop)
    kept = out.stats.kept[i, steps] / out.stats.length[i, steps, None, None].clip(1)
    return Answered(
        problem=problem,
        reply=reply,
        score=problem.score(reply),
        kept=kept.mean(axis=0),
        bytes_read=float(out.stats.bytes_read_fraction[i, steps].mean()),
    )


def capacity_for(tokens: int, configs: Sequence[RaBitQConfig | Selector | None]) -> int:
    """A capacity for so many tokens that suits every configuration."""
    unit = math.lcm(*(round_capacity(1, config) for config in configs))
    return -(-tokens // unit) * unit


def batches(items: Sequence[Any], tokens: int) -> Iterator[tuple[int, list[Any]]]:
    """The number of the first item and the items of each batch; the last batch is filled up, to fit one program."""
    size = batch_size(tokens, len(items))
    for first in range(0, len(items), size):
        part = list(items[first : first + size])
        yield first, [*part, *items[:1] * (size - len(part))]


def batch_size(tokens: int, problems: int) -> int:
    return max(1, min(BATCH_TOKENS // tokens, BATCH_MAX, problems))


def encode(tokenizer: Tokenizer, problem: Problem, *, chat: bool) -> list[int]:
    if chat and problem.chat:
        return tokenizer.apply_chat_template([{"role": "user", "content": problem.prompt}])
    return tokenizer.encode(problem.prompt)


def stop_tokens(tokenizer: Tokenizer, problems: Sequence[Problem]) -> tuple[int, ...]:
    """Tokens that end a reply: the tokenizer's, and those that hold a line's end, if that ends every problem's."""
    if not all("\n" in problem.stop for problem in problems):
        return tokenizer.eos_token_ids
    line_ends = (token for token in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([token]))
    return (*tokenizer.eos_token_ids, *line_ends)


def summarize(answered: Sequence[Answered]) -> list[dict]:
    """A row a task: score, its 95 % interval (Wilson's where scores are 0 or 1, else normal), and what was read."""
    by_task = defaultdict(list)
    for one in answered:
        by_task[one.problem.task].append(one)
    rows = []
    for task, group in by_task.items():
        scores = np.array([one.score for one in group])
        kept = np.mean([one.kept for one in group], axis=0)
        rows.append(
            {
                "task": task,
                "examples": len(group),
                "score": float(scores.mean()),
                "interval": interval(scores),
                "kept": float(kept.mean()),
                "kept_by_head": rounded(kept),
                "bytes_read": float(np.mean([one.bytes_read for one in group])),
            }
        )
    return rows


def interval(scores: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of a mean score."""
    if np.isin(scores, (0, 1)).all():
        proportion = binomtest(int(scores.sum()), len(scores)).proportion_ci(method="wilson")
        return float(proportion.low), float(proportion.high)
    half = 1.96 * scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 1.0
    return float(max(scores.mean() - half, 0)), float(min(scores.mean() + half, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """Texts whose continuations are known, as token ids."""

    prompts: list[list[int]]
    texts: list[list[int]]

    @classmethod
    def answers(cls, tokenizer: Tokenizer, problems: Sequence[Problem]) -> "Known":
        """Problems and their answers, up to the line's end."""
        return cls(
            prompts=[tokenizer.encode(problem.prompt) for problem in problems],
            texts=[tokenizer.encode(f" {problem.answers[0]}\n", add_special_tokens=False) for problem in problems],
        )

    @classmethod
    def plain(cls, tokenizer: Tokenizer, text: str, prompt_tokens: int, new_tokens: int, count: int) -> "Known":
        """`count` pieces of a text, of `prompt_tokens` tokens and `new_tokens` that follow."""
        ids, begin = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode("")
        size = prompt_tokens - len(begin) + new_tokens
        if len(ids) < size:
            raise ValueError(f"the text has {len(ids)} tokens, but {size} are needed")
        starts = np.linspace(0, len(ids) - size, count).astype(int)
        pieces = [begin + ids[start : start + size] for start in starts]
        return cls(
            prompts=[piece[:prompt_tokens] for piece in pieces], texts=[piece[prompt_tokens:] for piece in pieces]
        )


def probe(
    model: Decoder,
    known: Known,
    configs: Sequence[RaBitQConfig | Selector | None],
    *,
    key: jax.Array,
    progress: bool = False,
) -> list[list[Pass]]:
    """`teacher_forced` over known texts under each configuration: a pass a batch."""
    tokens, longest = max(map(len, known.prompts)), max(map(len, known.texts))
    capacity = capacity_for(tokens + longest, configs)
    passes: list[list[Pass]] = [[] for _ in configs]
    pairs = list(zip(known.prompts, known.texts, strict=True))
    total = -(-len(pairs) // batch_size(tokens, len(pairs))) * len(configs)
    with tqdm(total=total, desc="probes", unit="pass", disable=not progress) as bar:
        for first, part in batches(pairs, tokens):
            prompts, texts = [prompt for prompt, _ in part], [text for _, text in part]
            prefilled = Prefilled(model, prompts, capacity)
            # Texts that only fill the batch up count for nothing.
            real = np.arange(len(part)) < len(pairs) - first
            for done, config in zip(passes, configs, strict=True):
                # All texts in as many steps as the longest has, so that one program serves every batch.
                run = teacher_forced(
                    model, prefilled.start(config), prefilled.last, texts, config,
                    steps=longest, key=jax.random.fold_in(key, first),
                )  # fmt: skip
                done.append(dataclasses.replace(run, valid=run.valid & real[:, None]))
                bar.update()
    return passes


def compare(passes: Sequence[Pass], dense: Sequence[Pass]) -> dict:
    """Means over decode steps.

    The share of texts that greedy decoding reproduces whole; perplexity; divergence from dense (KL, in nats); what was
    read; and, over the layers that do not attend densely, the attention mass claimed, captured and, where it was,
    verified, and the error of the logits, where they are estimated.
    """
    exact, nll, divergence = [], [], []
    sums = defaultdict(list)
    for run, base in zip(passes, dense, strict=True):
        valid = run.valid
        right = run.log_probs.argmax(axis=-1) == run.targets
        exact += (right | ~valid).all(axis=1)[valid.any(axis=1)].tolist()
        nll.append(-np.take_along_axis(run.log_probs, run.targets[..., None], axis=-1)[..., 0][valid])
        divergence.append(np.sum(np.exp(base.log_probs) * (base.log_probs - run.log_probs), axis=-1)[valid])
        for name, values in vars(run.probes).items():
            if values is not None:
                sums[name].append(values[valid])
    steps = {name: np.concatenate(values) for name, values in sums.items()}  # [steps, L, ...]
    estimated = steps["error"].max(axis=(0, 2)) > 0
    sparse = estimated | (steps["kept"].min(axis=(0, 2)) < 1)

    def mean(name: str, layers: np.ndarray) -> float | None:
        found = float(steps[name][:, layers].mean()) if name in steps and layers.any() else math.nan
        return None if math.isnan(found) else found

    return {
        "steps": len(steps["kept"]),
        "exact": float(np.mean(exact)),
        "perplexity": float(np.exp(np.concatenate(nll).mean())),
        "divergence": float(np.concatenate(divergence).mean()),
        "kept": float(steps["kept"].mean()),
        "bytes_read": float(steps["bytes_read"].sum() / steps["bytes_dense"].sum()),
        "claimed": mean("claimed", sparse),
        "captured": mean("captured", sparse),
        "verified": mean("verified", sparse),
        "error_nats": mean("error", estimated),
        "captured_by_head": rounded(steps["captured"].mean(axis=0)),
        "claimed_by_head": rounded(steps["claimed"].mean(axis=0)),
        "error_nats_by_head": rounded(steps["error"].mean(axis=0)),
    }


def rounded(array: np.ndarray) -> list:
    """Numbers of five decimals; None for NaN, which JSON does not have."""
    return np.where(np.isnan(array), None, np.round(array.astype(float), 5)).tolist()
