"""Exact attention of one new token over a list of cached tokens per kv head."""

import jax
import jax.numpy as jnp

from pallas_kernels import gathered_attention as gathered_attention_kernel
from rabitq_jax._dispatch import select

TILE = 256


def gathered_attention_reference(query, keys, values, indices, counts, *, softmax_scale: float):
    """`gathered_attention` in tiles of the index list, with a running softmax: its definition.

    The work follows the longest list of the batch.
    """
    batch, kv_heads, group, head_dim = query.shape
    tile = min(TILE, indices.shape[-1])
    query = query.astype(jnp.float32)

    def attend_tile(i, state):
        peak, total, out = state
        start = jnp.minimum(i * tile, indices.shape[-1] - tile)
        slot = start + jnp.arange(tile)
        # The last tile may start early to stay inside; its first slots have been attended then.
        valid = (slot >= i * tile) & (slot < counts[..., None])
        index = jax.lax.dynamic_slice_in_dim(indices, start, tile, axis=-1)
        index = jnp.where(valid, index, 0)[..., None]
        key = jnp.take_along_axis(keys, index, axis=2).astype(jnp.float32)
        value = jnp.take_along_axis(values, index, axis=2).astype(jnp.float32)
        valid = valid[:, :, None, :]
        logits = softmax_scale * jnp.einsum("bkgd,bksd->bkgs", query, key, precision="highest")
        # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
        logits = jnp.where(valid, jnp.where(logits == -jnp.inf, jnp.nan, logits), -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        weights = jnp.where(valid, jnp.exp(logits - new_peak[..., None]), 0)
        decay = jnp.where(total == 0, 0.0, jnp.exp(peak - new_peak))
        total = total * decay + jnp.sum(weights, axis=-1)
        # Slots past the list read token 0, whose value may be anything: zero times NaN is not zero.
        value = jnp.where(valid[:, :, 0, :, None], value, 0)
        out = out * decay[..., None] + jnp.einsum("bkgs,bksd->bkgd", weights, value, precision="highest")
        return new_peak, total, out

    peak = jnp.full((batch, kv_heads, group), -jnp.inf, jnp.float32)
    state = (peak, jnp.zeros_like(peak), jnp.zeros((batch, kv_heads, group, head_dim), jnp.float32))
    tiles = (jnp.max(counts) + tile - 1) // tile
    _, total, out = jax.lax.fori_loop(0, tiles, attend_tile, state)
    return jnp.where(counts[..., None, None] == 0, 0.0, out / total[..., None])


IMPLEMENTATIONS = {"xla": gathered_attention_reference, "pallas": gathered_attention_kernel.gathered_attention}


def gathered_attention(query, keys, values, indices, counts, *, softmax_scale: float, implementation=None) -> jax.Array:
    """softmax(softmax_scale q K[indices]^T) V[indices] for each query head.

    Args:
      query: [B,K,G,D].
      keys, values: [B,K,T,D].
      indices: int32 [B,K,S], token numbers in [0, T); entries at or past `counts` are ignored.
      counts: int32 [B,K], from 0 to S.
      softmax_scale: factor from <q, k> to a logit.
      implementation: "xla", "pallas" or None.

    Returns:
      float32 [B,K,G,D]; zero where the list is empty; NaN where an attended logit is not finite.

    Raises:
      ValueError: shapes disagree.
      NotImplementedError: the kernel cannot take the shape.
    """
    if query.shape[-1] != keys.shape[-1] or keys.shape != values.shape:
        raise ValueError(f"head dimensions differ: query {query.shape}, keys {keys.shape}, values {values.shape}")
    attend = select(IMPLEMENTATIONS, implementation, gpu="pallas")
    return attend(query, keys, values, indices, counts, softmax_scale=softmax_scale)
