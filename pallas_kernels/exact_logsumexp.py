"""Log-sum-exp of the exact logits of sinks and window: one program a kv head, over the few tokens that are there.

The query heads of a kv head are the rows of one matrix product, padded to 16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas
from pallas_kernels.gathered_attention import LOWEST, load_query, product_shape

TILE = 128


def logsumexp_of_exact_tokens(quantized_ref, length_ref, query_ref, keys_ref, *, sink, softmax_scale):
    """For a kernel: quantized, length [], query [G,D], keys [T,D] -> float32 [M]."""
    head_dim, length = keys_ref.shape[1], length_ref[...]
    rows, columns = product_shape(*query_ref.shape)
    tile = TILE if columns * keys_ref.dtype.itemsize <= 256 else TILE // 2
    window_start = jnp.maximum(quantized_ref[...], sink)
    sinks = jnp.minimum(sink, length)
    count = sinks + jnp.maximum(length - window_start, 0)
    query = load_query(query_ref, keys_ref.dtype)
    dim = jax.lax.broadcasted_iota(jnp.int32, (tile, columns), 1)

    def add_tile(i, state):
        peak, total = state
        slot = i * tile + jnp.arange(tile, dtype=jnp.int32)
        valid = slot < count
        token = jnp.where(slot < sinks, slot, window_start + slot - sinks)
        keys = _pallas.load_masked(keys_ref, (token[:, None] + 0 * dim, dim), valid[:, None] & (dim < head_dim))
        logits = jnp.where(valid[None, :], softmax_scale * _pallas.dot(query, keys.T), LOWEST)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = jnp.where(valid[None, :], jnp.exp(logits - new_peak[:, None]), 0.0)
        return new_peak, total * jnp.exp(peak - new_peak) + jnp.sum(weights, axis=1)

    state = jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32)
    peak, total = jax.lax.fori_loop(0, pl.cdiv(count, tile), add_tile, state)
    return peak + jnp.log(total)


def _kernel(*refs, sink, softmax_scale):
    *inputs, out_ref = refs
    out_ref[...] = logsumexp_of_exact_tokens(*inputs, sink=sink, softmax_scale=softmax_scale)


def exact_logsumexp(query, keys, quantized, length, *, sink, window, softmax_scale):
    """`rabitq_jax.exact_logsumexp.exact_logsumexp_reference`."""
    del window  # the loop follows the lengths
    batch, kv_heads, group, head_dim = query.shape
    rows, _ = product_shape(group, head_dim)
    per_sequence = pl.BlockSpec((None,), lambda row: (row // kv_heads,))

    def head(*shape):
        return pl.BlockSpec((None, None, *shape), lambda row: (row // kv_heads, row % kv_heads, *(0,) * len(shape)))

    out = _pallas.call(
        functools.partial(_kernel, sink=sink, softmax_scale=softmax_scale),
        name="exact_logsumexp",
        grid=(batch * kv_heads,),
        in_specs=[per_sequence, per_sequence, head(*query.shape[2:]), head(*keys.shape[2:])],
        out_specs=head(rows),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, rows), jnp.float32),
    )(quantized, length, query, keys)
    return out[:, :, :group]
