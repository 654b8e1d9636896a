"""The baselines: dense attention of one new token over the whole cache, by XLA and by cuDNN."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.checks import check, relative_error
from benchmarks.suite import timed, weighed
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import LayerCache
from rabitq_jax.dense_attention import decode_attention


def cudnn_attention(query, keys, values, length) -> jax.Array:
    """`decode_attention` by cuDNN, of query [B,1,H,D] and keys, values [B,T,K,D]; length is int32 [B] or None."""
    return jax.nn.dot_product_attention(
        query, keys, values, key_value_seq_lengths=length, implementation="cudnn", scale=query.shape[-1] ** -0.5
    )


def dense_baselines(query: jax.Array, cache: LayerCache, bandwidth: float) -> dict[str, dict]:
    """Times of each baseline, with its share of the floor, for queries [B,K,G,D].

    cuDNN gets its own layout, and, where all sequences are equally long, no padding to mask.
    """
    batch, kv_heads, group, head_dim = query.shape
    scale = head_dim**-0.5
    xla = jax.jit(functools.partial(decode_attention, softmax_scale=scale))
    times = {"xla": timed(xla, query, cache.keys, cache.values, cache.length)}
    if on_gpu():
        longest = int(cache.length.max())
        keys, values = (jnp.copy(x[:, :, :longest].transpose(0, 2, 1, 3)) for x in (cache.keys, cache.values))
        length = None if int(cache.length.min()) == longest else cache.length
        flat = query.reshape(batch, 1, kv_heads * group, head_dim)
        cudnn = jax.jit(cudnn_attention)
        want = xla(query, cache.keys, cache.values, cache.length)
        check("cuDNN", relative_error(cudnn(flat, keys, values, length).reshape(want.shape), want), 0.02)
        times["cudnn"] = timed(cudnn, flat, keys, values, length)
    moved = 2 * kv_heads * head_dim * cache.keys.dtype.itemsize * int(cache.length.sum())
    return {name: found | weighed(moved, bandwidth, found["kernel_us"]["median"]) for name, found in times.items()}
