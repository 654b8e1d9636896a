"""Attention to a list of tokens, each with a weight of its own for every query head."""

import jax
import jax.numpy as jnp

from rabitq_jax.gathered_attention import Tiles, rescale


def weighted_attention(query, keys, values, indices, counts, log_weights, *, softmax_scale: float) -> jax.Array:
    """sum_i w_i exp(z_i) v_i / sum_i w_i exp(z_i) over the list, z_i = softmax_scale <q, k_i>.

    Args:
      query, keys, values, indices, counts: as in `gathered_attention`.
      log_weights: float32 [B,K,G,T], log w of every token; -inf takes no part.

    Returns:
      float32 [B,K,G,D]; zero where nothing takes part. In XLA alone, in tiles of the list.
    """
    tiles = Tiles(query, keys, values, indices, counts, softmax_scale)

    def attend_tile(i, state):
        peak, total, out = state
        valid, token, logits, value = tiles.load(i)
        weight = jnp.take_along_axis(log_weights, token[:, :, None], axis=-1)
        valid &= weight > -jnp.inf
        logits = jnp.where(valid, logits + weight, -jnp.inf)
        new_peak, weights, decay = rescale(peak, total, logits, valid)
        total = total * decay + jnp.sum(weights, axis=-1)
        out = out * decay[..., None] + jnp.einsum("bkgs,bksd->bkgd", weights, value, precision="highest")
        return new_peak, total, out

    _, total, out = jax.lax.fori_loop(0, tiles.count, attend_tile, tiles.start())
    return jnp.where(total[..., None] == 0, 0.0, out / jnp.where(total == 0, 1, total)[..., None])
