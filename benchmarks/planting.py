"""Caches in which a stated share of the tokens is worth attending.

Random keys give flat attention. So something is planted, of either kind; how much follows from what is then kept: Top-p
goes by estimates, and takes the union over a group.

cliff     some tokens are heavy: each points along one query of its group, far enough that a query's heavy tokens
          together hold `HEAVY_MASS` of its attention. All others are worth next to nothing.
spread    every token points along every query of its group, by a normal random amount: logits fall off smoothly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks.exact import captured_mass, exact_logits
from benchmarks.shapes import Case
from rabitq_jax import attention
from rabitq_jax.cache import Cache, LayerCache, init_layer_cache
from rabitq_jax.codes import Int4Query, quantize_query
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.top_p import Selection

HEAVY_MASS = 0.995
# Standard deviation of the coordinates of every key, beside what makes some heavy.
KEY_DEVIATION = 0.5
# Planted for each query at the least: one without a heavy token keeps nearly all of them.
LEAST_HEAVY = 16
ROUNDS = 5
# Deviations of spread logits in nats, and how often the range between them is halved.
DEVIATIONS, HALVINGS = (0.5, 10.0), 10
ROUNDING_KEY = 7


def planted_keys(prng_key: jax.Array, query: jax.Array, heavy: jax.Array, tokens: int) -> jax.Array:
    """Keys of which the share `heavy` points along a query.

    Args:
      query: [B,K,G,D].
      heavy: float32 [B], in (0, 1).
      tokens: T.

    Returns:
      bfloat16 [B,K,T,D].
    """
    batch, kv_heads, group, head_dim = query.shape
    noise_key, choice_key, head_key = jax.random.split(prng_key, 3)
    noise = KEY_DEVIATION * jax.random.normal(noise_key, (batch, kv_heads, tokens, head_dim), jnp.bfloat16)
    wide = query.astype(jnp.float32)
    of_one_query = heavy / group
    logit = jnp.log(HEAVY_MASS / (1 - HEAVY_MASS) * (1 - of_one_query) / of_one_query)
    size = logit[:, None, None, None] * head_dim**0.5 / jnp.sum(wide * wide, axis=-1, keepdims=True)
    along = (wide * size).astype(jnp.bfloat16)
    head = jax.random.randint(head_key, noise.shape[:3], 0, group)
    is_heavy = jax.random.uniform(choice_key, noise.shape[:3]) < heavy[:, None, None]
    return noise + jnp.where(is_heavy[..., None], jnp.take_along_axis(along, head[..., None], axis=2), 0)


def spread_keys(prng_key: jax.Array, query: jax.Array, deviation: jax.Array, tokens: int) -> jax.Array:
    """Keys whose logits deviate by so many nats for every query.

    Args:
      query: [B,K,G,D].
      deviation: float32 [B].
      tokens: T.

    Returns:
      bfloat16 [B,K,T,D].
    """
    batch, kv_heads, group, head_dim = query.shape
    noise_key, amount_key = jax.random.split(prng_key)
    noise = KEY_DEVIATION * jax.random.normal(noise_key, (batch, kv_heads, tokens, head_dim), jnp.bfloat16)
    wide = query.astype(jnp.float32)
    one_nat = wide * head_dim**0.5 / jnp.sum(wide * wide, axis=-1, keepdims=True)
    along = (deviation[:, None, None, None] * one_nat).astype(jnp.bfloat16)
    # In bfloat16 there is no normal number above 2.7, and many are equal.
    amount = jax.random.normal(amount_key, (batch, kv_heads, tokens, group)).astype(jnp.bfloat16)
    return noise + jnp.einsum("bktg,bkgd->bktd", amount, along)


@functools.partial(jax.jit, static_argnames=("tokens", "config", "make_keys"))
def _fill(
    prng_key, query, amount, length, *, tokens: int, config: RaBitQConfig | None, make_keys=planted_keys
) -> LayerCache:
    """A layer's cache with keys `make_keys(key, query, amount, tokens)`, random values, and codes if there is a
    config."""
    batch, kv_heads, _, head_dim = query.shape
    key_key, value_key = jax.random.split(prng_key)
    keys = make_keys(key_key, query, amount, tokens)
    values = jax.random.normal(value_key, keys.shape, keys.dtype)
    empty = init_layer_cache(batch, tokens, kv_heads, head_dim, None)
    layer = dataclasses.replace(empty, keys=keys, values=values, length=length)
    if config is None:
        return layer
    return with_codes(layer, config)


def with_codes(cache: LayerCache, config: RaBitQConfig) -> LayerCache:
    """A layer's cache with the codes of the tokens it holds."""
    config = dataclasses.replace(config, dense_layers=0)
    return attention.add_codes(Cache(layers=(cache,), rotation_seed=jnp.uint32(0)), config).layers[0]


@functools.partial(jax.jit, static_argnames="config")
def quantize(query: jax.Array, cache: LayerCache, config: RaBitQConfig) -> Int4Query:
    """The queries [B,K,G,D] in INT4, as `select` sees them."""
    assert cache.codes is not None
    return quantize_query(
        query, cache.codes.rotation, cache.codes.query_centroid,
        rounding=config.query_rounding, key=jax.random.key(ROUNDING_KEY),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="config")
def select(query: jax.Array, cache: LayerCache, config: RaBitQConfig) -> Selection:
    """The Selection of a decode step with these queries [B,K,G,D]."""
    key = jax.random.key(ROUNDING_KEY)
    return attention.attend_selected(query, cache, config, query.shape[-1] ** -0.5, key)[1]


def planted_cache(
    prng_key: jax.Array, query: jax.Array, share: jax.Array, length: jax.Array, *, tokens: int,
    config: RaBitQConfig | None,
) -> LayerCache:  # fmt: skip
    """A layer's cache of which a decode step with this query keeps the stated share.

    Args:
      query: [B,K,G,D].
      share: float32 [B], of the tokens held; where sinks, window and `LEAST_HEAVY` tokens a query are more, those are
        kept.
      length: int32 [B].
      tokens: T, the capacity.
      config: decides what is kept; None makes a cache without codes, of which the share is heavy.
    """
    if config is None:
        return _fill(prng_key, query, share, length, tokens=tokens, config=None)
    fewest = LEAST_HEAVY * query.shape[2] / length
    heavy = jnp.maximum(share, fewest)
    for _ in range(ROUNDS):
        cache = _fill(prng_key, query, heavy, length, tokens=tokens, config=config)
        exact = length - jnp.maximum(cache.quantized - config.sink, 0)
        kept = jnp.mean(select(query, cache, config).counts, axis=1)
        heavy = heavy * jnp.maximum(share * length - exact, 1) / jnp.maximum(kept - exact, 1)
        heavy = jnp.clip(heavy, fewest, 0.9)
    return _fill(prng_key, query, heavy, length, tokens=tokens, config=config)


def spread_cache(
    prng_key: jax.Array, query: jax.Array, share: jax.Array, length: jax.Array, *, tokens: int, config: RaBitQConfig
) -> LayerCache:
    """As `planted_cache`, with spread logits."""
    fill = functools.partial(_fill, prng_key, query, length=length, tokens=tokens, config=config, make_keys=spread_keys)
    low, high = (jnp.full(length.shape, deviation) for deviation in DEVIATIONS)
    for _ in range(HALVINGS):
        deviation = jnp.sqrt(low * high)
        kept = jnp.mean(select(query, fill(amount=deviation), config).counts, axis=1)
        # The sharper the attention, the fewer.
        are_too_many = kept > share * length
        low, high = jnp.where(are_too_many, deviation, low), jnp.where(are_too_many, high, deviation)
    return fill(amount=jnp.sqrt(low * high))


def planted_case(case: Case, config: RaBitQConfig) -> tuple[jax.Array, LayerCache]:
    """Queries, bfloat16 [B,K,G,D], and the cache that is planted for them."""
    shape = case.shape
    query_key, cache_key = jax.random.split(jax.random.key(0))
    query = jax.random.normal(query_key, (shape.batch, shape.kv_heads, shape.group, shape.head_dim), jnp.bfloat16)
    share, length = jnp.array(case.shares, jnp.float32), jnp.array(case.lengths, jnp.int32)
    plant = spread_cache if case.spread else planted_cache
    return query, plant(cache_key, query, share, length, tokens=shape.tokens, config=config)


@jax.jit
def true_mass(query: jax.Array, cache: LayerCache, selection: Selection) -> jax.Array:
    """Share of each query's exact attention in the tokens that its kv head attends: float32 [B,K,G]."""
    return captured_mass(exact_logits(query, cache), selection.indices, selection.counts)


def kept_facts(query: jax.Array, cache: LayerCache, selection: Selection) -> dict:
    """What is kept, for a row: the share of the tokens, over all and by sequence, and the mass it holds."""
    share = jnp.mean(selection.counts, axis=1) / cache.length
    true = true_mass(query, cache, selection)
    return {
        "kept": float(selection.counts.sum() / (cache.length.sum() * selection.counts.shape[1])),
        "kept_by_sequence": [float(x) for x in share],
        "estimated_mass": float(selection.mass.mean()),
        "true_mass": float(true.mean()),
        "least_true_mass": float(true.min()),
    }
