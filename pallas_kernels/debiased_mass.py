"""Sums of debiased weights below thresholds: C1 and C2 of rabitq_jax/thresholds.py, for many thresholds at once.

    masses_below   program (kv head, block): sums over its tokens, for each query head and threshold

Blocks are summed by XLA in a fixed order, so every run gives the same bits. A histogram would need one pass less, but
atomic additions of floats, whose order is not fixed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas

BLOCK_TOKENS = 2048
TILE = 128


def deviation(noise, scale, least):
    """A token's standard deviation, as `rabitq_jax.thresholds.deviation_of`."""
    return jnp.maximum(noise * scale.astype(jnp.float32), least)


def _kernel(
    quantized_ref, noise_ref, peak_ref, thresholds_ref, scale_ref, scores_ref, first_ref, second_ref,
    *, block, tile, sink, least_deviation,
):  # fmt: skip
    """quantized [], noise and peak [G], thresholds [G,J], scale [T], scores [G,T] -> C1 and C2 [G,J] of this block."""
    start = pl.program_id(1) * block
    quantized = quantized_ref[...]
    group, ways = thresholds_ref.shape

    @pl.when((start >= quantized) | (start + block <= sink))
    def _():
        for g in range(group):
            first_ref[g, :] = second_ref[g, :] = jnp.zeros((ways,), jnp.float32)

    @pl.when((start < quantized) & (start + block > sink))
    def _():
        for g in range(group):
            threshold = thresholds_ref[g, :][:, None]

            def add_tile(i, sums, g=g, threshold=threshold):
                first, second = sums
                token = start + i * tile + jnp.arange(tile, dtype=jnp.int32)
                scored = (token >= sink) & (token < quantized)
                sd = deviation(noise_ref[g], scale_ref[pl.ds(start + i * tile, tile)], least_deviation)
                debiased = scores_ref[g, pl.ds(start + i * tile, tile)] - 0.5 * sd * sd
                weight = jnp.exp(debiased - peak_ref[g])
                # What is not finite is below no threshold, and always kept.
                below = scored[None, :] & (debiased[None, :] < threshold)
                return first + jnp.where(below, weight[None, :], 0), second + jnp.where(below, (weight**2)[None, :], 0)

            zero = jnp.zeros((ways, tile), jnp.float32)
            first, second = jax.lax.fori_loop(0, block // tile, add_tile, (zero, zero))
            first_ref[g, :] = jnp.sum(first, axis=1)
            second_ref[g, :] = jnp.sum(second, axis=1)


def masses_below(scores, noise, scale, quantized, peak, thresholds, *, sink, least_deviation):
    """C1 and C2 at each threshold.

    Args:
      scores: float32 [B,K,G,T].
      noise, peak: float32 [B,K,G].
      scale: bfloat16 [B,K,T].
      quantized: int32 [B].
      thresholds: float32 [B,K,G,J], J a power of two.

    Returns:
      Two float32 [B,K,G,J].

    Raises:
      NotImplementedError: T is not a multiple of 16.
    """
    batch, kv_heads, group, tokens = scores.shape
    ways = thresholds.shape[-1]
    block = _pallas.block_of(tokens, BLOCK_TOKENS)
    blocks = tokens // block
    inputs = (noise, peak, thresholds, scale, scores)
    part = pl.BlockSpec((None, None, group, ways), lambda row, i: (row, i, 0, 0))
    first, second = _pallas.call(
        functools.partial(_kernel, block=block, tile=min(TILE, block), sink=sink, least_deviation=least_deviation),
        name="masses_below",
        grid=(batch * kv_heads, blocks),
        in_specs=[_pallas.per_sequence(kv_heads)] + [_pallas.per_head(x, kv_heads) for x in inputs],
        out_specs=[part, part],
        out_shape=[jax.ShapeDtypeStruct((batch * kv_heads, blocks, group, ways), jnp.float32)] * 2,
    )(quantized, *inputs)
    return tuple(jnp.sum(x, axis=1).reshape(thresholds.shape) for x in (first, second))
