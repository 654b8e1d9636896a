"""Proxy scores by AND and population count on packed words.

A level u in [-8, 7] is four bit planes, u = -8 u3 + 4 u2 + 2 u1 + u0, so that over the words w of a key's code

    <u, bits> = sum_w  popc(w & u0) + 2 popc(w & u1) + 4 popc(w & u2) - 8 popc(w & u3)

One program scores a block of tokens for all query heads of a kv head: the words are read once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas

PLANE_WEIGHTS = (1, 2, 4, -8)
BLOCK_TOKENS = 512


def bit_planes(levels: jax.Array) -> jax.Array:
    """Bit planes in two's complement: int8 [..., 32 W] -> int32 [..., 4, W], bit i of word w from level 32 w + i."""
    words = levels.reshape(*levels.shape[:-1], 1, -1, 32).astype(jnp.int32)
    plane = jnp.arange(4, dtype=jnp.int32)[:, None, None]
    ones = ((words >> plane) & 1).astype(jnp.uint32)
    packed = jnp.sum(ones << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def epilogue(dots, gain, scale, bias, bias_gain, shift):
    """Equation (1) after the integer product: int32 dots and float32 factors to float32 scores."""
    scores = dots.astype(jnp.float32) * gain * scale
    if bias is not None:
        scores = scores + bias_gain * bias
    return scores + shift


def _kernel(length_ref, planes_ref, sums_ref, gain_ref, shift_ref, bits_ref, scale_ref, *rest, block, bias_gain):
    """length [], planes [G,4,W], sums and gain [G], shift [G,C], bits [T,W], scale and bias [T] -> scores [G,T]."""
    *bias_refs, out_ref = rest
    group, _, words = planes_ref.shape
    tokens_per_centroid = bits_ref.shape[0] // shift_ref.shape[1]
    start = pl.program_id(1) * block

    @pl.when(start < length_ref[...])
    def _():
        here = pl.ds(start, block)
        token = start + jnp.arange(block, dtype=jnp.int32)
        scale = scale_ref[here].astype(jnp.float32)
        bias = bias_refs[0][here].astype(jnp.float32) if bias_refs else None
        code = [bits_ref[here, w] for w in range(words)]
        for g in range(group):
            dots = jnp.zeros((block,), jnp.int32)
            for plane, weight in enumerate(PLANE_WEIGHTS):
                for w in range(words):
                    dots += weight * jax.lax.population_count(code[w] & planes_ref[g, plane, w])
            shift = shift_ref[g, token // tokens_per_centroid]
            out_ref[g, here] = epilogue(2 * dots - sums_ref[g], gain_ref[g], scale, bias, bias_gain, shift)


def proxy_scores(levels, bits, gain, scale, bias, bias_gain, shift, *, length):
    """`rabitq_jax.scores.proxy_scores_reference` for the first length[b] tokens of sequence b; the rest is undefined.

    Raises:
      NotImplementedError: T is not a multiple of 16.
    """
    group = levels.shape[2]
    block = _pallas.block_of(bits.shape[2], BLOCK_TOKENS)
    # Population counts lower for int32 alone.
    inputs = [bit_planes(levels), jnp.sum(levels, axis=-1, dtype=jnp.int32), gain, shift]
    inputs += [jax.lax.bitcast_convert_type(bits, jnp.int32), scale] + ([] if bias is None else [bias])
    kernel = functools.partial(_kernel, block=block, bias_gain=bias_gain)
    return scores_call(kernel, "popcount_scores", block, length, inputs, group)


def scores_call(kernel, name, block, length, inputs, group):
    """Launch a score kernel: a program for each kv head and block of tokens, which gets a head's inputs [...] whole."""
    batch, kv_heads, tokens = inputs[-1].shape

    def head(shape):
        return pl.BlockSpec((None, None, *shape), lambda row, i: (row // kv_heads, row % kv_heads, *(0,) * len(shape)))

    return _pallas.call(
        kernel,
        name=name,
        grid=(batch * kv_heads, tokens // block),
        in_specs=[pl.BlockSpec((None,), lambda row, i: (row // kv_heads,))] + [head(x.shape[2:]) for x in inputs],
        out_specs=head((group, tokens)),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, group, tokens), jnp.float32),
    )(length, *inputs)
