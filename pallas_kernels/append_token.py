"""One new token of each sequence into its cache, in place: one program a kv head writes a key and a value."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas


def _kernel(length_ref, new_ref, key_ref, value_ref, _keys_in, _values_in, keys_ref, values_ref):
    """length and new [], key and value [D] -> keys and values [T,D], updated."""
    head_dim, length = key_ref.shape[0], length_ref[...]
    dim = jnp.arange(_pallas.power_of_two(head_dim), dtype=jnp.int32)
    # A token past the capacity is dropped.
    written = (dim < head_dim) & (new_ref[...] > 0) & (length < keys_ref.shape[0])
    for token_ref, held_ref in ((key_ref, keys_ref), (value_ref, values_ref)):
        token = _pallas.load_masked(token_ref, (dim,), dim < head_dim)
        _pallas.store_masked(held_ref, (length + 0 * dim, dim), token.astype(held_ref.dtype), written)


def append_token(keys, values, key, value, length, new_tokens):
    """`rabitq_jax.cache.append_reference` for one token.

    Args:
      keys, values: [B,K,T,D], updated in place.
      key, value: [B,K,D].
      length: int32 [B], where the token goes.
      new_tokens: int32 [B], 1, or 0 for a sequence that gets none.

    Returns:
      New keys and values.
    """
    batch, kv_heads = keys.shape[:2]
    per_sequence = pl.BlockSpec((None,), lambda row: (row // kv_heads,))

    def head(array):
        shape = array.shape[2:]
        return pl.BlockSpec((None, None, *shape), lambda row: (row // kv_heads, row % kv_heads, *(0,) * len(shape)))

    inputs = (key, value, keys, values)
    return _pallas.call(
        _kernel,
        name="append_token",
        grid=(batch * kv_heads,),
        in_specs=[per_sequence, per_sequence, *map(head, inputs)],
        out_specs=[head(keys), head(values)],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (keys, values)],
        input_output_aliases={4: 0, 5: 1},
        num_warps=1,
    )(length, new_tokens, *inputs)
