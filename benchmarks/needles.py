"""Attention heads with an answer planted in their context: does sparse attention still read it?

Heads are those of synthetic.py with all their properties (keys with a mean and outlier channels, rotary embedding, most
of the variance in few directions, a sink). The value of every token but the sink is one of `ANSWERS` codes. A query
head asks for one needle: `SPAN` tokens in a row, somewhere, which have the same code and together hold `NEEDLE_MASS` of
its attention. Its answer is the code nearest to its output; dense attention answers nearly all right.
"""

import dataclasses

import numpy as np

from benchmarks.synthetic import GROUP, KV_HEADS, RANK, low_rank_noise, rotary

TASKS = {
    "asked": "the last queries of the prompt ask for the needle, as a question at its end does",
    "new": "nothing in the prompt asks for it: the query comes as a surprise, as that of a second question does",
}
ANSWERS, SPAN, NEEDLE_MASS = 32, 4, 0.2
LOGIT_DEVIATION = 3.0
# The prompt's last queries, as many as methods see, and those of them that ask.
OBSERVED, ASKING = 1024, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
    """P problems of one task; float32.

    Attributes:
      keys, values: [P,T,K,D], of the prompt and, last, the new token.
      queries: [P,N,H,D], of the prompt's last tokens, before the new one.
      query: [P,H,D], the new token's.
      codes: [ANSWERS,D], what values may be.
      answers: int [P,H], the code of each query head's needle.
    """

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    query: np.ndarray
    codes: np.ndarray
    answers: np.ndarray


def make_needles(task: str, tokens: int, head_dim: int, problems: int, seed: int) -> Needles:
    """Problems of one of TASKS, with `tokens` tokens in the cache."""
    codes = np.random.default_rng(seed).normal(size=(ANSWERS, head_dim))
    rng = np.random.default_rng([seed, list(TASKS).index(task)])
    heads = [[_make_head(task, tokens, head_dim, codes, rng) for _ in range(KV_HEADS)] for _ in range(problems)]
    keys, values, queries, query, answers = (
        np.stack([np.stack([head[i] for head in problem]) for problem in heads]) for i in range(5)
    )
    flat = lambda x: x.reshape(*x.shape[:-3], KV_HEADS * GROUP, head_dim)  # noqa: E731
    return Needles(
        keys=keys.swapaxes(1, 2).astype(np.float32),
        values=values.swapaxes(1, 2).astype(np.float32),
        queries=flat(queries.swapaxes(1, 2)).astype(np.float32),
        query=flat(query).astype(np.float32),
        codes=codes.astype(np.float32),
        answers=answers.reshape(problems, -1),
    )


def _make_head(task: str, tokens: int, head_dim: int, codes, rng):
    """keys [T,D], values [T,D], queries [N,G,D], query [G,D] and answers [G] of one kv head."""
    mean_key, mean_query = 3 * rng.normal(size=head_dim), rng.normal(size=head_dim)
    mean_key[rng.choice(head_dim, 2, replace=False)] *= 10
    around = low_rank_noise(rng.normal(size=(RANK, head_dim)), rng)
    observed = min(OBSERVED, tokens - 1)

    # Before rotary embedding.
    asking = mean_query + around(GROUP)
    before = mean_query + around(observed * GROUP).reshape(observed, GROUP, head_dim)
    if task == "asked":
        before[-ASKING:] = asking + 0.3 * around(ASKING * GROUP).reshape(ASKING, GROUP, head_dim)
    keys = rotary(mean_key + around(tokens), np.arange(tokens))
    query = rotary(asking, np.full(GROUP, tokens - 1))
    place = np.repeat(np.arange(tokens - 1 - observed, tokens - 1), GROUP)
    queries = rotary(before.reshape(-1, head_dim), place).reshape(before.shape)
    size = LOGIT_DEVIATION / (query @ keys.T / head_dim**0.5).std(axis=1).mean()
    query, queries = size * query, size * queries

    code = rng.integers(ANSWERS, size=tokens)
    # One stretch of the context for each needle, so that they do not meet.
    stretch = tokens * 3 // 4 // GROUP
    starts = tokens // 8 + stretch * rng.permutation(GROUP) + rng.integers(stretch - SPAN, size=GROUP)
    spans = starts[:, None] + np.arange(SPAN)
    answers = code[starts]
    code[spans] = answers[:, None]
    along = query.mean(axis=0)
    rest = np.logaddexp.reduce(query @ keys[1:].T / head_dim**0.5, axis=1)
    # The sink has about as much as all the others.
    keys[0] = rest.mean() * head_dim**0.5 * along / (along @ along)
    logits = query @ keys.T / head_dim**0.5
    total = np.logaddexp.reduce(logits, axis=1)
    wanted = total + np.log(NEEDLE_MASS / (1 - NEEDLE_MASS) / SPAN)
    # The smallest change of a needle's keys that gives them the logit, for its own query and no other of the group.
    gram = query @ query.T
    for g in range(GROUP):
        missing = np.zeros((GROUP, SPAN))
        missing[g] = (wanted[g] - logits[g, spans[g]]) * head_dim**0.5
        keys[spans[g]] += np.linalg.solve(gram, missing).T @ query
    values = codes[code]
    values[0] = 0
    return keys, values, queries, query, answers
