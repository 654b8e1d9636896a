"""A ragged batch through a prompt and 200 decode steps under a retrieval method, and what NumPy makes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rabitq_jax import attention
from rabitq_jax.cache import init_selector_cache
from rabitq_jax.selectors import (
    CacheShape,
    FullAttention,
    OracleTopK,
    OracleTopP,
    Quest,
    Selector,
    Step,
    StreamingLLM,
    TopK,
    TopKThenTopP,
    TopP,
)  # fmt: skip

BATCH, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 3, 4, 2, 32, 512
GROUP = HEADS // KV_HEADS
PROMPT = np.array([150, 60, 9])
STEPS = 200
SCALE = HEAD_DIM**-0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with a small budget and with a full one; the most tokens that a kv head attends with the small one, and
    first and last tokens that it attends in any case."""

    small: Selector
    whole: Selector
    most: int = CAPACITY
    sink: int = 0
    recent: int = 1


# 28 scored tokens for each query head.
SCORING = dict(rule=TopK(budget=40), sink=4, recent=8)
SCORED = dict(most=12 + GROUP * 28, sink=4, recent=8)
ALL = TopK(budget=2 * CAPACITY)
CASES = {
    "full": Case(FullAttention(), FullAttention()),
    "oracle-top-k": Case(OracleTopK(**SCORING), OracleTopK(rule=ALL), **SCORED),
    "oracle-top-p": Case(
        OracleTopP(rule=TopP(top_p=0.7), sink=4, recent=8), OracleTopP(rule=TopP(top_p=1.0)), sink=4, recent=8
    ),
    "oracle-both": Case(
        OracleTopK(rule=TopKThenTopP(budget=40, top_p=0.7), sink=4, recent=8),
        OracleTopK(rule=TopKThenTopP(budget=2 * CAPACITY, top_p=1.0)),
        **SCORED,
    ),
    "streaming-llm": Case(StreamingLLM(sink=4, recent=24), StreamingLLM(recent=CAPACITY), most=28, sink=4, recent=24),
    "quest": Case(
        Quest(page=8, rule=TopK(budget=48), sink=8, recent=8),
        Quest(page=8, rule=ALL),
        most=8 + 15 + GROUP * 24,
        sink=8,
        recent=8,
    ),  # fmt: skip
}


@functools.cache
def inputs():
    """Prompt and new tokens: query [B,N,H,D], key and value [B,N,K,D]. Keys have means, and attention is not flat."""
    rng = np.random.default_rng(0)
    tokens = PROMPT.max() + STEPS
    mean = np.random.default_rng(1).normal(size=(KV_HEADS, HEAD_DIM)) * np.where(np.arange(HEAD_DIM) % 8, 0.5, 3)
    query = 2 * rng.normal(size=(BATCH, tokens, HEADS, HEAD_DIM))
    key = mean + rng.normal(size=(BATCH, tokens, KV_HEADS, HEAD_DIM))
    value = rng.normal(size=(BATCH, tokens, KV_HEADS, HEAD_DIM))
    return tuple(x.astype(np.float32) for x in (query, key, value))


@functools.partial(jax.jit, static_argnames=("last",))
def prefill(query, key, value, cache, new_tokens, last=True):
    return attention.prefill(query, key, value, cache, None, new_tokens=new_tokens, last=last)[1]


@jax.jit
def decode(query, key, value, cache, active, previous=None):
    """A step of attention.decode, with the selection that it makes."""
    out, new_cache, stats = attention.decode(query, key, value, cache, None, active=active, previous=previous)
    appended = attention.append(cache, key[:, None], value[:, None], active.astype(jnp.int32))
    step = Step(
        softmax_scale=SCALE, new_tokens=active.astype(jnp.int32), previous=None if previous is None else previous.state
    )
    grouped = query.reshape(BATCH, KV_HEADS, GROUP, HEAD_DIM)
    selection = attention.attend_with_selector(grouped, appended, step)[1].selection
    return new_cache, (out, selection, stats)


@dataclasses.dataclass
class Run:
    """Outputs and selections of all steps, as NumPy arrays with the step first, and the last cache."""

    selector: Selector
    out: np.ndarray
    selection: object
    stats: object
    cache: object

    def kept(self, step: int, b: int, k: int) -> set[int]:
        """The tokens attended by a kv head."""
        return set(self.selection.indices[step, b, k, : self.selection.counts[step, b, k]].tolist())


def empty_cache(selector: Selector, batch=BATCH):
    shape = CacheShape(
        batch=batch, capacity=CAPACITY, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.float32
    )
    return init_selector_cache(shape, selector)


@functools.cache
def run(selector: Selector, steps: int = STEPS) -> Run:
    """The prompt in two chunks, then one step at a time. Nothing may be compiled but in the first step."""
    query, key, value = inputs()
    cache = empty_cache(selector)
    half = PROMPT.max() // 2
    for start in (0, half):
        chunk = (x[:, start : start + half] for x in (query, key, value))
        cache = prefill(*chunk, cache, np.clip(PROMPT - start, 0, half), last=start > 0)
    compiled, outputs = decode._cache_size(), []
    active, rows = np.ones(BATCH, bool), np.arange(BATCH)
    for n in range(steps):
        cache, output = decode(*(x[rows, PROMPT + n] for x in (query, key, value)), cache, active)
        outputs.append(output)
    assert decode._cache_size() == compiled + 1
    out, selection, stats = jax.tree.map(lambda *x: np.stack(x), *outputs)
    return Run(selector=selector, out=out, selection=selection, stats=stats, cache=cache)


@dataclasses.dataclass
class History:
    """What one kv head has seen at a decode step, in float64: keys and values [t,D], the new queries [G,D], and the
    queries [t,G,D] of all tokens; the first `prompt` tokens are the prompt."""

    keys: np.ndarray
    values: np.ndarray
    query: np.ndarray
    queries: np.ndarray
    prompt: int

    @property
    def logits(self) -> np.ndarray:
        """[G,t]."""
        return self.query @ self.keys.T * SCALE


def history(step: int, b: int, k: int) -> History:
    held = PROMPT[b] + step + 1
    query, key, value = (x[b, :held].astype(np.float64) for x in inputs())
    queries = query[:, k * GROUP : (k + 1) * GROUP]
    return History(key[:, k], value[:, k], queries[-1], queries, int(PROMPT[b]))


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attend(seen: History, tokens) -> np.ndarray:
    """Attention [G,D] of the new queries to a set of tokens."""
    tokens = sorted(tokens)
    return softmax(seen.logits[:, tokens]) @ seen.values[tokens]


def largest(scores, count: int, first: int, stop: int) -> set[int]:
    """The places of the `count` largest scores in [first, stop)."""
    order = first + np.argsort(-scores[first:stop], kind="stable")
    return set(order[: max(count, 0)].tolist())


def places():
    """Steps, sequences and kv heads at which rules are compared."""
    return [(step, b, k) for step in (0, 57, STEPS - 1) for b in range(BATCH) for k in range(KV_HEADS)]
