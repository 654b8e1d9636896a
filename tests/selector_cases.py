"""A ragged batch through a prompt and 200 decode steps under a retrieval method, and what NumPy makes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rabitq_jax import attention
from rabitq_jax.cache import LayerCache, append, init_selector_cache
from rabitq_jax.selectors import (
    H2O,
    KIVI,
    CacheShape,
    DoubleSparsity,
    DuoAttention,
    ExtendedRaBitQ,
    FullAttention,
    MagicPIG,
    OracleTopK,
    OracleTopP,
    PQCache,
    PyramidKV,
    Quest,
    Selector,
    SnapKV,
    SparQ,
    Step,
    StreamingLLM,
    TidalDecode,
    TopK,
    TopKThenTopP,
    TopP,
    Twilight,
)
from rabitq_jax.selectors.tidal_decode import SharingLayer

BATCH, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 3, 4, 2, 32, 512
GROUP = HEADS // KV_HEADS
PROMPT = np.array([150, 60, 9])
STEPS = 200
SCALE = HEAD_DIM**-0.5
# Methods are run in the last of so many layers.
LAYERS = 3


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
    "quest-top-p": Case(
        Quest(page=8, rule=TopP(top_p=0.7), sink=8, recent=8), Quest(page=8, rule=TopP(top_p=1.0)), sink=8, recent=8
    ),
    "h2o": Case(H2O(budget=30, recent=10), H2O(budget=CAPACITY), most=30, recent=10),
    # The prompt's budget, and all that is generated.
    "snapkv": Case(
        SnapKV(budget=30, observed=8, kernel=3), SnapKV(budget=CAPACITY, observed=8), most=30 + STEPS, recent=8
    ),
    # The last layer has a quarter of the mean budget beside the window: 5 tokens.
    "pyramidkv": Case(
        PyramidKV(budget=30, observed=8, kernel=3, beta=4),
        PyramidKV(budget=CAPACITY, observed=8, beta=1),
        most=13 + STEPS,
        recent=8,
    ),
    "sparq": Case(SparQ(channels=8, **SCORING), SparQ(channels=8, rule=ALL), **SCORED),
    "double-sparsity": Case(DoubleSparsity(channels=8, **SCORING), DoubleSparsity(channels=8, rule=ALL), **SCORED),
    "tidal-decode": Case(
        TidalDecode(selection_layers=(1,), **SCORING), TidalDecode(selection_layers=(1,), rule=ALL), **SCORED
    ),
    "twilight": Case(
        Twilight(base=Quest(page=8, rule=TopK(budget=80)), rule=TopP(top_p=0.7), sink=4, recent=8),
        Twilight(base=FullAttention(), rule=TopP(top_p=1.0)),
        most=12 + GROUP * 80,
        sink=4,
        recent=8,
    ),  # fmt: skip
    "twilight-full": Case(
        Twilight(base=FullAttention(), rule=TopP(top_p=0.7), sink=4, recent=8),
        Twilight(base=Quest(page=8, rule=ALL), rule=TopP(top_p=1.0)),
        sink=4,
        recent=8,
    ),
    "magicpig": Case(
        MagicPIG(bits=6, tables=20, sink=4, recent=8), MagicPIG(tables=10, recent=CAPACITY), sink=4, recent=8
    ),
    "pqcache": Case(PQCache(parts=4, bits=4, **SCORING), PQCache(parts=4, bits=4, rule=ALL), **SCORED),
    "duo-attention": Case(DuoAttention(sink=4, recent=8), DuoAttention(retrieval=1.0), sink=4, recent=8),
    "kivi": Case(KIVI(bits=2, group=16, residual=32), KIVI(residual=CAPACITY)),
    **{
        f"extended-rabitq-{bits}-{centroid}": Case(
            ExtendedRaBitQ(bits=bits, key_centroid=centroid, **SCORING),
            ExtendedRaBitQ(bits=bits, key_centroid=centroid, rule=TopP(top_p=1.0)),
            **SCORED,
        )
        for bits, centroid in ((1, "prompt"), (1, "none"), (2, "prompt"), (4, "prompt"))
    },
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
    """A step as `attention.decode` takes it, which hands out no selection."""
    new_tokens = active.astype(jnp.int32)
    cache = append(cache, key[:, None], value[:, None], new_tokens)
    step = Step(softmax_scale=SCALE, new_tokens=new_tokens, previous=previous)
    cache, attended = attention.attend_with_selector(query.reshape(BATCH, KV_HEADS, GROUP, HEAD_DIM), cache, step)
    out = attended.out.reshape(BATCH, HEADS, HEAD_DIM)
    return cache, (out, attended.selection.indices, attended.selection.counts, attended.bytes_read)


@dataclasses.dataclass
class Run:
    """Outputs, selections and bytes of all steps, as NumPy arrays with the step first, and the last cache."""

    out: np.ndarray
    indices: np.ndarray
    counts: np.ndarray
    bytes_read: np.ndarray
    cache: LayerCache

    def kept(self, step: int, b: int, k: int) -> set[int]:
        """The tokens attended by a kv head."""
        return set(self.indices[step, b, k, : self.counts[step, b, k]].tolist())


SHAPE = CacheShape(
    batch=BATCH, capacity=CAPACITY, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.float32
)


def filled_cache(selector: Selector) -> LayerCache:
    """The prompt in two chunks."""
    cache, half = init_selector_cache(SHAPE, selector), PROMPT.max() // 2
    for start in (0, half):
        chunk = (x[:, start : start + half] for x in inputs())
        cache = prefill(*chunk, cache, np.clip(PROMPT - start, 0, half), last=start > 0)
    return cache


def run(selector: Selector, steps: int) -> Run:
    """The prompt, then one step at a time, in the last layer. Nothing may be compiled but in the first step.

    A layer that attends what the one below has selected gets that of a layer with the same inputs.
    """
    own, below = selector.for_layer(LAYERS - 1, LAYERS), selector.for_layer(LAYERS - 2, LAYERS)
    cache, outputs, compiled = filled_cache(own), [], 0
    cache_below = filled_cache(below) if isinstance(own, SharingLayer) else None
    active, rows = np.ones(BATCH, bool), np.arange(BATCH)
    for n in range(steps):
        tokens, previous = [x[rows, PROMPT + n] for x in inputs()], None
        if cache_below is not None:
            cache_below, _ = decode(*tokens, cache_below, active)
            previous = cache_below.state
        cache, output = decode(*tokens, cache, active, previous)
        outputs.append(output)
        compiled = compiled or decode._cache_size()
    assert decode._cache_size() == compiled
    return Run(*jax.tree.map(lambda *x: np.stack(x), *outputs), cache)


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


def places(steps: int):
    """Steps, sequences and kv heads at which rules are compared."""
    return [(step, b, k) for step in (0, steps // 3, steps - 1) for b in range(BATCH) for k in range(KV_HEADS)]
