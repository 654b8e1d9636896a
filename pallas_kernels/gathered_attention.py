"""Exact attention of one token over a list of cached tokens per kv head, split over the list and combined.

    attend    program (kv head, split): an equal run of the list's tiles, whatever its length ->  peak, total, out
    combine   program (kv head, query head, columns): all splits of a head, rescaled to the largest peak

The query heads of a kv head are the rows of one matrix product, padded to 16. Lists may be empty or hold every token.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas

LEAST_ROWS = 16
TILE = 64
PROGRAMS = 512
LOWEST = -1e30
COMBINED_COLUMNS = 32


def _attend_kernel(
    count_ref, query_ref, keys_ref, values_ref, indices_ref, peak_ref, total_ref, out_ref, logits_ref=None,
    *, splits, tile, softmax_scale,
):  # fmt: skip
    """count [], query [G,D], keys and values [T,D], indices [S] -> peak and total [M], out [M,Dp] of this split; and,
    if asked for, the logits [G,S] of the list's tokens."""
    head_dim = keys_ref.shape[1]
    rows, columns = product_shape(*query_ref.shape)
    count = count_ref[...]
    tiles = pl.cdiv(count, tile)
    split = pl.program_id(1)
    first, stop = split * tiles // splits, (split + 1) * tiles // splits
    query = load_query(query_ref, keys_ref.dtype)
    dim = jax.lax.broadcasted_iota(jnp.int32, (tile, columns), 1)

    def load_rows(ref, index, valid):
        at = (index[:, None] + 0 * dim, dim)
        return _pallas.load_masked(ref, at, valid[:, None] & (dim < head_dim))

    def attend_tile(i, state):
        peak, total, out = state
        slot = i * tile + jnp.arange(tile, dtype=jnp.int32)
        valid = slot < count
        index = _pallas.load_masked(indices_ref, (slot,), valid)
        logits = softmax_scale * _pallas.dot(query, load_rows(keys_ref, index, valid).T)
        # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
        logits = jnp.where(valid[None, :], jnp.where(logits == -jnp.inf, jnp.nan, logits), LOWEST)
        if logits_ref is not None:
            row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, tile), axis) for axis in (0, 1))
            listed = (row < query_ref.shape[0]) & valid[None, :]
            _pallas.store_masked(logits_ref, (row, i * tile + column), logits, listed)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        decay = jnp.exp(peak - new_peak)
        weights = jnp.where(valid[None, :], jnp.exp(logits - new_peak[:, None]), 0.0)
        values = load_rows(values_ref, index, valid)
        out = out * decay[:, None] + _pallas.dot(weights.astype(values.dtype), values)
        return new_peak, total * decay + jnp.sum(weights, axis=1), out

    state = (
        jnp.full((rows,), LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, columns), jnp.float32),
    )
    peak_ref[...], total_ref[...], out_ref[...] = jax.lax.fori_loop(first, stop, attend_tile, state)


def _combine_kernel(peak_ref, total_ref, partial_ref, out_ref):
    """peak and total [splits], partial [splits,C] -> out [C], some columns; zero if every split was empty."""
    peak = peak_ref[...]
    weight = jnp.exp(peak - jnp.max(peak))
    total = jnp.sum(weight * total_ref[...])
    out = jnp.sum(weight[:, None] * partial_ref[...], axis=0)
    out_ref[...] = jnp.where(total == 0, 0.0, out / total).astype(out_ref.dtype)


def product_shape(group, head_dim):
    """Rows and columns of query heads in a matrix product: powers of two of at least 16."""
    return tuple(max(LEAST_ROWS, _pallas.power_of_two(size)) for size in (group, head_dim))


def load_query(query_ref, dtype):
    """Queries [G,D] as the rows of a product, zeros behind them."""
    group, head_dim = query_ref.shape
    shape = product_shape(group, head_dim)
    row, dim = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return _pallas.load_masked(query_ref, (row, dim), (row < group) & (dim < head_dim)).astype(dtype)


def gathered_attention(query, keys, values, indices, counts, *, softmax_scale, dtype):
    """`rabitq_jax.gathered_attention.gathered_attention_reference`."""
    return _attend(query, keys, values, indices, counts, softmax_scale=softmax_scale, dtype=dtype, with_logits=False)[0]


def gathered_attention_and_logits(query, keys, values, indices, counts, *, softmax_scale):
    """`gathered_attention`, and the listed tokens' logits in the list's order, float32 [B,K,G,S]."""
    return _attend(
        query, keys, values, indices, counts, softmax_scale=softmax_scale, dtype=jnp.float32, with_logits=True
    )


def _attend(query, keys, values, indices, counts, *, softmax_scale, dtype, with_logits):
    batch, kv_heads, group, head_dim = query.shape
    heads = batch * kv_heads
    rows, columns = product_shape(group, head_dim)
    # A tile's keys and values must fit into shared memory, where float32 takes three times the room (see _pallas.dot).
    tile = _pallas.block_of(indices.shape[-1], TILE if columns * keys.dtype.itemsize <= 512 else TILE // 2)
    splits = min(_pallas.power_of_two(pl.cdiv(PROGRAMS, heads)), _pallas.power_of_two(indices.shape[-1] // tile))

    def head(shape):
        return pl.BlockSpec((None, None, *shape), lambda row, i: (row // kv_heads, row % kv_heads, *(0,) * len(shape)))

    def part(*shape):
        return pl.BlockSpec((None, None, *shape), lambda row, i: (row, i, *(0,) * len(shape)))

    logits_shape = [jax.ShapeDtypeStruct((batch, kv_heads, group, indices.shape[-1]), jnp.float32)] * with_logits
    peak, total, partial, *logits = _pallas.call(
        functools.partial(_attend_kernel, splits=splits, tile=tile, softmax_scale=softmax_scale),
        name="gathered_attention",
        grid=(heads, splits),
        in_specs=[head(x.shape[2:]) for x in (counts, query, keys, values, indices)],
        out_specs=[part(rows), part(rows), part(rows, columns)] + [head(x.shape[2:]) for x in logits_shape],
        out_shape=[
            jax.ShapeDtypeStruct((heads, splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((heads, splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((heads, splits, rows, columns), jnp.float32),
            *logits_shape,
        ],
    )(counts, query, keys, values, indices)

    some = min(columns, COMBINED_COLUMNS)
    one_row = pl.BlockSpec((None, splits, None), lambda row, g, part: (row, 0, g))
    some_columns = pl.BlockSpec((None, splits, None, some), lambda row, g, part: (row, 0, g, part))

    out = _pallas.call(
        _combine_kernel,
        name="combine_splits",
        grid=(heads, group, columns // some),
        in_specs=[one_row, one_row, some_columns],
        out_specs=pl.BlockSpec((None, None, some), lambda row, g, part: (row, g, part)),
        out_shape=jax.ShapeDtypeStruct((heads, group, columns), dtype),
    )(peak, total, partial)
    return (out.reshape(batch, kv_heads, group, columns)[..., :head_dim], *logits)
