"""Exact attention of one new token over a list of cached tokens per kv head."""

import jax
import jax.numpy as jnp

from pallas_kernels import gathered_attention as gathered_attention_kernel
from pallas_kernels import mosaic_attention
from rabitq_jax._dispatch import on_hopper, select

TILE = 256


def gathered_attention_reference(query, keys, values, indices, counts, *, softmax_scale: float, dtype):
    """`gathered_attention` in tiles of the index list, with a running softmax: its definition.

    The work follows the longest list of the batch.
    """
    tiles = Tiles(query, keys, values, indices, counts, softmax_scale)

    def attend_tile(i, state):
        peak, total, out = state
        valid, _, logits, value = tiles.load(i)
        new_peak, weights, decay = rescale(peak, total, logits, valid)
        total = total * decay + jnp.sum(weights, axis=-1)
        out = out * decay[..., None] + jnp.einsum("bkgs,bksd->bkgd", weights, value, precision="highest")
        return new_peak, total, out

    _, total, out = jax.lax.fori_loop(0, tiles.count, attend_tile, tiles.start())
    return jnp.where(counts[..., None, None] == 0, 0.0, out / total[..., None]).astype(dtype)


class Tiles:
    """The lists of all kv heads, cut in tiles."""

    def __init__(self, query, keys, values, indices, counts, softmax_scale: float):
        self._query, self._keys, self._values = query.astype(jnp.float32), keys, values
        self._indices, self._counts, self._softmax_scale = indices, counts, softmax_scale
        self._size = min(TILE, indices.shape[-1])
        self.count = (jnp.max(counts) + self._size - 1) // self._size

    def start(self):
        """Peak and total of no weights yet, float32 [B,K,G], and their output [B,K,G,D]."""
        peak = jnp.full(self._query.shape[:3], -jnp.inf, jnp.float32)
        return peak, jnp.zeros_like(peak), jnp.zeros(self._query.shape, jnp.float32)

    def load(self, i):
        """Tile i: which slots are in the list, bool [B,K,1,tile]; their tokens, int32 [B,K,tile]; logits, float32
        [B,K,G,tile], -inf past the list; and values, float32 [B,K,tile,D]."""
        start = jnp.minimum(i * self._size, self._indices.shape[-1] - self._size)
        slot = start + jnp.arange(self._size)
        # The last tile may start early to stay inside; its first slots have been attended then.
        valid = (slot >= i * self._size) & (slot < self._counts[..., None])
        token = jax.lax.dynamic_slice_in_dim(self._indices, start, self._size, axis=-1)
        token = jnp.where(valid, token, 0)
        index = token[..., None]
        key = jnp.take_along_axis(self._keys, index, axis=2).astype(jnp.float32)
        value = jnp.take_along_axis(self._values, index, axis=2).astype(jnp.float32)
        valid = valid[:, :, None, :]
        logits = self._softmax_scale * jnp.einsum("bkgd,bksd->bkgs", self._query, key, precision="highest")
        # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
        logits = jnp.where(valid, jnp.where(logits == -jnp.inf, jnp.nan, logits), -jnp.inf)
        # Slots past the list read token 0, whose value may be anything: zero times NaN is not zero.
        return valid, token, logits, jnp.where(valid[:, :, 0, :, None], value, 0)


def rescale(peak, total, logits, valid):
    """The running softmax: the new peak, the tile's weights relative to it, and the factor of what came before."""
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
    weights = jnp.where(valid, jnp.exp(logits - new_peak[..., None]), 0)
    return new_peak, weights, jnp.where(total == 0, 0.0, jnp.exp(peak - new_peak))


IMPLEMENTATIONS = {
    "xla": gathered_attention_reference,
    "pallas": gathered_attention_kernel.gathered_attention,
    "mosaic": mosaic_attention.gathered_attention,
}


def gpu_implementation(query: jax.Array, keys: jax.Array) -> str:
    """What `None` means on a GPU."""
    takes = mosaic_attention.takes(query.shape[2], query.shape[3], keys.dtype.name)
    return "mosaic" if on_hopper() and takes else "pallas"


def gathered_attention(
    query, keys, values, indices, counts, *, softmax_scale: float, dtype=jnp.float32, implementation=None
) -> jax.Array:
    """softmax(softmax_scale q K[indices]^T) V[indices] for each query head.

    Args:
      query: [B,K,G,D].
      keys, values: [B,K,T,D].
      indices: int32 [B,K,S], token numbers in [0, T); entries at or past `counts` are ignored.
      counts: int32 [B,K], from 0 to S.
      softmax_scale: factor from <q, k> to a logit.
      dtype: of the result; sums are float32.
      implementation: "xla", "pallas", "mosaic" (for Hopper GPUs) or None.

    Returns:
      [B,K,G,D]; zero where the list is empty; NaN where an attended logit is not finite.

    Raises:
      ValueError: shapes disagree.
      NotImplementedError: the kernel cannot take the shape.
    """
    if query.shape[-1] != keys.shape[-1] or keys.shape != values.shape:
        raise ValueError(f"head dimensions differ: query {query.shape}, keys {keys.shape}, values {values.shape}")
    attend = select(IMPLEMENTATIONS, implementation, gpu=gpu_implementation(query, keys))
    return attend(query, keys, values, indices, counts, softmax_scale=softmax_scale, dtype=dtype)
