"""Exact attention over a whole cache, to compare what was attended with."""

import jax
import jax.numpy as jnp

from rabitq_jax.cache import LayerCache


def exact_logits(query: jax.Array, cache: LayerCache) -> jax.Array:
    """Scaled logits, float32 [B,K,G,T], of queries [B,K,G,D]; minus infinity in slots that hold no token."""
    logits = query.shape[-1] ** -0.5 * jnp.einsum(
        "bkgd,bktd->bkgt", query.astype(cache.keys.dtype), cache.keys,
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    held = jnp.arange(cache.capacity) < cache.length[:, None, None, None]
    return jnp.where(held, logits, -jnp.inf)


def is_scored(cache: LayerCache, sink: int) -> jax.Array:
    """bool [B,1,1,T], True for the tokens whose logits a decode step estimates."""
    position = jnp.arange(cache.capacity)
    return ((position >= sink) & (position < cache.quantized[:, None]))[:, None, None]


def attended(indices: jax.Array, counts: jax.Array) -> jax.Array:
    """bool [B,K,T], True for the tokens in lists int32 [B,K,T] of `counts` int32 [B,K] tokens each."""
    batch, kv_heads, tokens = indices.shape
    index = jnp.where(jnp.arange(tokens) < counts[..., None], indices, tokens)
    rows = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
    return jnp.zeros(indices.shape, bool).at[*rows, index].set(True, mode="drop")


def captured_mass(logits: jax.Array, indices: jax.Array, counts: jax.Array) -> jax.Array:
    """Share of each query's attention that lies in its kv head's list of tokens: float32 [B,K,G].

    Args:
      logits: `exact_logits`.
      indices, counts: as in `Selection`.
    """
    return jnp.sum(jnp.where(attended(indices, counts)[:, :, None], jax.nn.softmax(logits, axis=-1), 0), axis=-1)
