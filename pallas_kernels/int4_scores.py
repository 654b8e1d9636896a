"""Proxy scores by an integer matrix product on tensor cores: code bits, unpacked to int8, times INT4 levels.

    [block, 32] bits of word w  @  [32, heads] levels of dimensions 32 w .. 32 w + 31,   summed over w in int32

The query heads of a kv head are the columns, padded to 16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas
from pallas_kernels.popcount_scores import epilogue, scores_call

BLOCK_TOKENS = 128
LEAST_COLUMNS = 16


def _kernel(length_ref, levels_ref, sums_ref, gain_ref, shift_ref, bits_ref, scale_ref, *rest, block, group, bias_gain):
    """length [], levels [W,32,M], sums and gain [M], shift [M,C], bits [T,W], scale and bias [T] -> scores [G,T]."""
    *bias_refs, out_ref = rest
    words, _, columns = levels_ref.shape
    tokens_per_centroid = bits_ref.shape[0] // shift_ref.shape[1]
    start = pl.program_id(1) * block

    @pl.when(start < length_ref[...])
    def _():
        here = pl.ds(start, block)
        token = start + jnp.arange(block, dtype=jnp.int32)
        bit = jax.lax.broadcasted_iota(jnp.uint32, (block, 32), 1)
        dots = jnp.zeros((block, columns), jnp.int32)
        for w in range(words):
            ones = ((bits_ref[here, w][:, None] >> bit) & 1).astype(jnp.int8)
            dots += jnp.dot(ones, levels_ref[w], preferred_element_type=jnp.int32)
        scale = scale_ref[here].astype(jnp.float32)[:, None]
        bias = bias_refs[0][here].astype(jnp.float32)[:, None] if bias_refs else None
        column = jax.lax.broadcasted_iota(jnp.int32, (block, columns), 1)
        row = token[:, None] + 0 * column
        shift = shift_ref[column, row // tokens_per_centroid]
        scores = epilogue(2 * dots - sums_ref[...][None, :], gain_ref[...][None, :], scale, bias, bias_gain, shift)
        _pallas.store_masked(out_ref, (column, row), scores, column < group)


def proxy_scores(levels, bits, gain, scale, bias, bias_gain, shift, *, length):
    """`rabitq_jax.scores.proxy_scores_reference` for the first length[b] tokens of sequence b; the rest is undefined.

    Raises:
      NotImplementedError: T is not a multiple of 16.
    """
    group, tokens = levels.shape[2], bits.shape[2]
    block = _pallas.block_of(tokens, BLOCK_TOKENS)
    columns = max(LEAST_COLUMNS, _pallas.power_of_two(group))

    def pad_heads(x):
        return jnp.pad(x, [(0, 0), (0, 0), (0, columns - group)] + [(0, 0)] * (x.ndim - 3))

    levels, gain, shift = pad_heads(levels), pad_heads(gain), pad_heads(shift)
    sums = jnp.sum(levels, axis=-1, dtype=jnp.int32)
    by_word = levels.reshape(*levels.shape[:3], -1, 32).transpose(0, 1, 3, 4, 2)
    inputs = [by_word, sums, gain, shift, bits, scale] + ([] if bias is None else [bias])
    kernel = functools.partial(_kernel, block=block, group=group, bias_gain=bias_gain)
    return scores_call(kernel, "int4_scores", block, length, inputs, group)
