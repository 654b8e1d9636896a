"""One layer under any method: RaBitQ or a selector, its cache, a decode step, and what that step must give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks.exact import attended, exact_logits
from benchmarks.planting import ROUNDING_KEY, with_codes
from benchmarks.timing import NO_CUDA_GRAPHS
from rabitq_jax import RaBitQConfig, attention
from rabitq_jax.cache import LayerCache, init_state
from rabitq_jax.selectors import KIVI, Attended, CacheShape, MagicPIG, Selector, SparQ, Step
from rabitq_jax.selectors.arguments import parse_selector
from rabitq_jax.selectors.tidal_decode import SelectingLayer, SharingLayer

Method = RaBitQConfig | Selector
# Methods that differ between layers are measured in the middle layer of Llama-3.1-8B.
LAYER, LAYERS = 16, 32
# One setting of each, with about as many tokens to attend as the cases of shapes.py keep at 128K tokens: 1,024 for each
# of four query heads are 3 %.
EACH = (
    "full",
    "oracle-top-k:budget=1024",
    "oracle-top-p:sink=16,recent=64,top_p=0.95",
    "rabitq:top_p=0.95",
    "rabitq:top_p=0.95,key_centroid=prompt",
    "rabitq:top_p=0.95,key_centroid=none",
    *(f"extended-rabitq:bits={bits},top_p=0.95" for bits in (1, 2, 4)),
    "streaming-llm:sink=4,recent=4092",
    "h2o:budget=4096",
    "snapkv:budget=4096",
    "pyramidkv:budget=4096",
    "quest:page=16,budget=1024",
    "sparq:channels=32,budget=1024",
    "double-sparsity:channels=16,budget=1024",
    "tidal-decode:budget=1024",
    "twilight:base=quest,budget=8192,top_p=0.85",
    "twilight:base=full,top_p=0.85",
    "magicpig:bits=8,tables=75",
    "pqcache:parts=2,bits=6,budget=1024",
    "duo-attention:retrieval=0.5",
    "kivi:bits=2",
)


def expand(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Methods as texts, with those of `EACH` in place of "all".

    Raises:
      ValueError: a text is no method; see `parse_selector`.
    """
    expanded = tuple(one for text in texts for one in (EACH if text == "all" else (text,)))
    for text in expanded:
        in_layer(text)
    return expanded


def in_layer(text: str) -> Method:
    """What the method "quest:page=16,budget=1024" is in `LAYER`.

    Raises:
      ValueError: as `parse_selector`.
    """
    method = parse_selector(text)
    return method if isinstance(method, RaBitQConfig) else method.for_layer(LAYER, LAYERS)


@functools.partial(jax.jit, static_argnames="method")
def under(cache: LayerCache, queries: jax.Array, *, method: Method) -> LayerCache:
    """A layer's cache under a method, as a decode step finds it once its token has come.

    Args:
      cache: without codes and selector; its last token is the new one, those before are the prompt.
      queries: [B,N,H,D], of the prompt's last tokens.
    """
    ones = jnp.ones_like(cache.length)
    prompt = dataclasses.replace(cache, length=cache.length - 1)
    if isinstance(method, RaBitQConfig):
        return dataclasses.replace(with_codes(prompt, method), length=cache.length)
    batch, kv_heads, capacity, head_dim = cache.keys.shape
    shape = CacheShape(
        batch=batch, capacity=capacity, num_heads=queries.shape[2], num_kv_heads=kv_heads, head_dim=head_dim,
        dtype=cache.keys.dtype,
    )  # fmt: skip
    state = method.observe(init_state(shape, method), prompt, queries, queries.shape[1] * ones)
    state = method.update(method.build(state, prompt), cache, _step(cache))
    return dataclasses.replace(cache, selector=method, state=state)


def layer_below(query: jax.Array, cache: LayerCache, queries: jax.Array, *, method: Method) -> LayerCache | None:
    """For a layer that attends what one below has selected: that one's cache, after its step with the same queries."""
    if not isinstance(method, SharingLayer):
        return None
    selecting = SelectingLayer(rule=method.rule, sink=method.sink, recent=method.recent)
    below = under(cache, queries, method=selecting)
    return dataclasses.replace(below, state=timed_part(query, below, method=selecting)[1])


@functools.partial(jax.jit, static_argnames="method")
def attend(query: jax.Array, cache: LayerCache, below: LayerCache | None = None, *, method: Method):
    """Output [B,K,G,D], selection, and bytes read float32 [B], of queries [B,K,G,D].

    Args:
      cache: `under` this method.
      below: `layer_below`.
    """
    result = _attend(query, cache, below, method)
    return result.out, result.selection, result.bytes_read


# Kernels of a branch inside of a CUDA graph are in no profile.
@functools.partial(jax.jit, static_argnames="method", compiler_options=NO_CUDA_GRAPHS)
def timed_part(query: jax.Array, cache: LayerCache, below: LayerCache | None = None, *, method: Method):
    """Output and state alone: a list that is only reported, as full attention's is, would take its time."""
    result = _attend(query, cache, below, method)
    return result.out, result.state


def _attend(query, cache: LayerCache, below: LayerCache | None, method: Method) -> Attended:
    if isinstance(method, RaBitQConfig):
        scale, key = query.shape[-1] ** -0.5, jax.random.key(ROUNDING_KEY)
        out, selection, stats = attention.attend_selected(query, cache, method, scale, key)
        return Attended(out=out, selection=selection, bytes_read=stats.bytes_read, state=None)
    return method.attend(query, cache.state, cache, _step(cache, below))


def _step(cache: LayerCache, below: LayerCache | None = None) -> Step:
    scale, new_tokens = cache.keys.shape[-1] ** -0.5, jnp.ones_like(cache.length)
    return Step(softmax_scale=scale, new_tokens=new_tokens, previous=below and below.state)


@functools.partial(jax.jit, static_argnames="method")
def expected_output(query: jax.Array, cache: LayerCache, selection, *, method: Method) -> jax.Array:
    """float32 [B,K,G,D] in plain jnp over the whole cache: exact attention to the tokens of the step's selection, or
    what SparQ, MagicPIG and KIVI make of it: the mean value mixed in, weights, keys and values of few bits."""
    listed = attended(selection.indices, selection.counts)[:, :, None]
    logits, values = exact_logits(query, cache), cache.values.astype(jnp.float32)
    if isinstance(method, MagicPIG):
        logits += method.log_weights(query, cache.state, cache)
    if isinstance(method, KIVI):
        keys, values = method.held(cache.state, cache)
        logits = exact_logits(query, dataclasses.replace(cache, keys=keys))
    weights = jax.nn.softmax(jnp.where(listed, logits, -jnp.inf), axis=-1)
    if isinstance(method, SparQ):
        held = jnp.arange(cache.capacity) < cache.length[:, None, None, None]
        scores = jnp.where(held, method.score(query, cache.state, cache, _step(cache)), -jnp.inf)
        alpha = jnp.sum(jnp.where(listed, jax.nn.softmax(scores, axis=-1), 0), axis=-1, keepdims=True)
        weights = alpha * weights + (1 - alpha) * held / cache.length[:, None, None, None]
    # Slots without a token may hold anything.
    values = jnp.where((jnp.arange(cache.capacity) < cache.length[:, None])[:, None, :, None], values, 0)
    return jnp.einsum("bkgt,bktd->bkgd", weights, values, precision="highest")
