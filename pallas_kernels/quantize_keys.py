"""Block quantization of keys: one program codes one block of one kv head, in place.

    keys [interval, D] - centroid -> rotate -> signs packed word by word, |x|_1 and |x|_2^2 accumulated beside

The grid covers `max_blocks` blocks behind `first_block`; programs at or past `stop_block` return at once, so that a
decode step that completes no block costs a launch.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas

# Numbers of the keys that are multiplied at a time, which must fit into shared memory twice (see _pallas.dot).
LARGEST_PRODUCT = 16384


def _kernel(first_ref, stop_ref, keys_ref, rotation_ref, *rest, interval, has_bias):
    """first, stop []; keys [T,D], rotation [32 W, D], query centroid [D] if has_bias; then the state before and after:
    bits [T,W], scale [T], bias [T] if has_bias, centroids [C,D]."""
    query_centroid_ref, state = (rest[0], rest[1:]) if has_bias else (None, rest)
    old, new = state[: len(state) // 2], state[len(state) // 2 :]
    old_centroids_ref, new_centroids_ref = old[-1], new[-1]
    bits_ref, scale_ref = new[:2]
    head_dim, words = keys_ref.shape[1], bits_ref.shape[1]
    columns = _pallas.power_of_two(head_dim)
    block = first_ref[...] + pl.program_id(1)

    def row_of(ref, row):
        dim = jnp.arange(columns, dtype=jnp.int32)
        index = (dim,) if row is None else (row + 0 * dim, dim)
        return _pallas.load_masked(ref, index, dim < head_dim).astype(jnp.float32)

    def quantize(start, residual):
        tile = residual.shape[0]
        here = pl.ds(start, tile)
        l1 = jnp.zeros((tile,), jnp.float32)
        l2 = jnp.zeros((tile,), jnp.float32)
        word_dim = jax.lax.broadcasted_iota(jnp.int32, (32, columns), 1)
        word_row = jax.lax.broadcasted_iota(jnp.int32, (32, columns), 0)
        bit = jax.lax.broadcasted_iota(jnp.int32, (tile, 32), 1)
        for w in range(words):
            rows = _pallas.load_masked(rotation_ref, (32 * w + word_row, word_dim), word_dim < head_dim, 0.0)
            rotated = _pallas.dot(residual, rows.T)
            l1 += jnp.sum(jnp.abs(rotated), axis=1)
            l2 += jnp.sum(rotated * rotated, axis=1)
            word = jnp.sum((rotated > 0).astype(jnp.int32) << bit, axis=1)
            bits_ref[here, w] = jax.lax.bitcast_convert_type(word, jnp.uint32)
        scale_ref[here] = jnp.where(l1 == 0, 0.0, l2 / l1).astype(scale_ref.dtype)
        if has_bias:
            c_q = row_of(query_centroid_ref, None)
            new[2][here] = jnp.sum(residual * c_q[None, :], axis=1).astype(new[2].dtype)

    @pl.when(block < stop_ref[...])
    def _():
        tile = min(interval, LARGEST_PRODUCT // columns)
        parts = range(0, interval, tile)
        keys = [_load_keys(keys_ref, block * interval + part, tile, columns) for part in parts]
        if old_centroids_ref.shape[0] > 1:
            total = functools.reduce(jnp.add, [jnp.sum(part, axis=0) for part in keys])
            centroid = (total / interval).astype(new_centroids_ref.dtype)
            column = jnp.arange(columns, dtype=jnp.int32)
            _pallas.store_masked(new_centroids_ref, (block + 0 * column, column), centroid, column < head_dim)
            centroid = centroid.astype(jnp.float32)
        else:
            centroid = row_of(old_centroids_ref, 0)
        for part, some_keys in zip(parts, keys, strict=True):
            quantize(block * interval + part, some_keys - centroid[None, :])


def _load_keys(keys_ref, start, tile: int, columns: int):
    """float32 [tile, columns], zeros past the head dimension."""
    token = start + jax.lax.broadcasted_iota(jnp.int32, (tile, columns), 0)
    dim = jax.lax.broadcasted_iota(jnp.int32, (tile, columns), 1)
    return _pallas.load_masked(keys_ref, (token, dim), dim < keys_ref.shape[1]).astype(jnp.float32)


def quantize_keys(
    keys, bits, scale, bias, centroids, query_centroid, rotation, first_block, stop_block, *, interval, max_blocks
):
    """Code blocks [first_block[b], stop_block[b]) of each sequence's keys; `rabitq_jax.codes.update_codes_reference`.

    Args:
      keys: [B,K,T,D].
      bits uint32 [B,K,T,W], scale [B,K,T], bias [B,K,T] or None, centroids [B,K,C,D]: updated in place.
      query_centroid: float32 [B,K,D] or None, as bias is.
      rotation: float32 [32 W, D].
      first_block, stop_block: int32 [B].

    Returns:
      New bits, scale, bias (or None) and centroids.

    Raises:
      NotImplementedError: interval is not a power of two of at least 16.
    """
    if interval < 16 or interval & (interval - 1):
        raise NotImplementedError(f"the kernel takes intervals that are powers of two of at least 16, got {interval}")
    batch, kv_heads = keys.shape[:2]
    has_bias = bias is not None
    per_sequence = pl.BlockSpec((None,), lambda row, i: (row // kv_heads,))

    def head(array):
        shape = array.shape[2:]
        return pl.BlockSpec((None, None, *shape), lambda row, i: (row // kv_heads, row % kv_heads, *(0,) * len(shape)))

    inputs = [first_block, stop_block, keys, rotation] + ([query_centroid] if has_bias else [])
    in_specs = [per_sequence, per_sequence, head(keys), pl.BlockSpec(rotation.shape, lambda row, i: (0, 0))]
    in_specs += [head(array) for array in inputs[4:]]
    states = [bits, scale] + ([bias] if has_bias else []) + [centroids]
    new = _pallas.call(
        functools.partial(_kernel, interval=interval, has_bias=has_bias),
        name="quantize_keys",
        grid=(batch * kv_heads, max_blocks),
        in_specs=in_specs + [head(array) for array in states],
        out_specs=[head(array) for array in states],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in states],
        input_output_aliases={len(inputs) + i: i for i in range(len(states))},
    )(*inputs, *states)
    return new[0], new[1], new[2] if has_bias else None, new[-1]
