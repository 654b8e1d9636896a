"""Exact attention over everything: the prompt's causal attention, and a decode step over the whole cache."""

import math

import jax
import jax.numpy as jnp

from rabitq_jax._dispatch import on_gpu

QUERY_BLOCK = 512
KEY_BLOCK = 1024


def decode_attention(query, keys, values, length, *, softmax_scale: float) -> jax.Array:
    """Attention of one new token a sequence over the first `length` cached tokens.

    Args:
      query: [B,K,G,D].
      keys, values: [B,K,T,D].
      length: int32 [B], at least 1.

    Returns:
      float32 [B,K,G,D]; NaN where an attended logit is not finite.
    """
    visible = jnp.arange(keys.shape[2]) < length[:, None]
    logits = softmax_scale * _einsum("bkgd,bktd->bkgt", query, keys)
    # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
    logits = jnp.where(logits == -jnp.inf, jnp.nan, logits)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=-1)
    return _einsum("bkgt,bktd->bkgd", weights.astype(values.dtype), values)


def _einsum(subscripts: str, a, b):
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=jnp.float32)


def prefill_attention(query, keys, values, start, *, fresh: bool, softmax_scale: float, implementation=None):
    """Causal attention of a chunk of new tokens over the cache that already holds them.

    Args:
      query: [B,N,H,D]; query i of sequence b is token start[b] + i and sees the tokens up to itself.
      keys, values: [B,K,T,D], the cache, with the chunk in slots start[b] .. start[b] + N - 1 (those that are padding
        may lie past T and be missing).
      start: int32 [B].
      fresh: every start is 0, so that the cache holds nothing but the chunk.
      implementation: "cudnn" (fused, on a GPU; half precision, D a multiple of 8), "xla" (blocks of queries and
        keys, memory linear in N), or None: "cudnn" on a GPU where it takes the shape, else "xla".

    Returns:
      [B,N,H,D] in query's dtype. Rows of padding are undefined.

    Raises:
      NotImplementedError: cudnn was named for a dtype or D that it does not take.
    """
    cudnn_fits = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if implementation is None:
        implementation = "cudnn" if on_gpu() and cudnn_fits else "xla"
    if implementation == "cudnn":
        if not cudnn_fits:
            raise NotImplementedError(
                f"cudnn takes float16 or bfloat16 and head dims that are multiples of 8 up to 256, "
                f"got {query.dtype} and {query.shape[-1]}"
            )
        return _prefill_cudnn(query, keys, values, start, fresh=fresh, softmax_scale=softmax_scale)
    if implementation != "xla":
        raise ValueError(f"implementation must be 'cudnn', 'xla' or None, got {implementation!r}")
    return _prefill_xla(query, keys, values, start, softmax_scale=softmax_scale)


def _visible_from_queries(start, chunk: int, tokens: int):
    """bool [B,N,T]: token t is not after query i."""
    last = start[:, None] + jnp.arange(chunk)
    return jnp.arange(tokens) <= last[..., None]


def _prefill_cudnn(query, keys, values, start, *, fresh: bool, softmax_scale: float):
    chunk, tokens = query.shape[1], keys.shape[2]
    if fresh:
        keys, values = keys[:, :, :chunk], values[:, :, :chunk]
        mask = None
    else:
        mask = _visible_from_queries(start, chunk, tokens)[:, None]
    return jax.nn.dot_product_attention(
        query,
        keys.transpose(0, 2, 1, 3),
        values.transpose(0, 2, 1, 3),
        mask=mask,
        is_causal=fresh,
        scale=softmax_scale,
        implementation="cudnn",
    )


def _prefill_xla(query, keys, values, start, *, softmax_scale: float):
    """Blocks of queries, each over blocks of keys up to its last one, with a running softmax."""
    batch, chunk, heads, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    block = min(QUERY_BLOCK, chunk)
    blocks = -(-chunk // block)
    padded = jnp.pad(query, ((0, 0), (0, blocks * block - chunk), (0, 0), (0, 0)))
    grouped = padded.reshape(batch, blocks, block, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 3, 4, 2, 5)
    key_block = math.gcd(tokens, KEY_BLOCK)

    def attend_block(arguments):
        index, queries = arguments  # [B,K,G,block,D]
        first = start + index * block
        visible = _visible_from_queries(first, block, tokens)

        def attend_keys(i, state):
            peak, total, out = state
            cut = lambda array, axis: jax.lax.dynamic_slice_in_dim(array, i * key_block, key_block, axis)  # noqa: E731
            logits = softmax_scale * _einsum("bkgnd,bktd->bkgnt", queries, cut(keys, 2))
            logits = jnp.where(cut(visible, 2)[:, None, None], logits, -jnp.inf)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1, keepdims=True))
            weights, decay = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
            values_cut = cut(values, 2)
            out = out * decay + _einsum("bkgnt,bktd->bkgnd", weights.astype(values.dtype), values_cut)
            return new_peak, total * decay + jnp.sum(weights, axis=-1, keepdims=True), out

        # Every query sees token 0, so that the first block of keys makes its peak finite.
        peak = jnp.full((*queries.shape[:-1], 1), -jnp.inf, jnp.float32)
        state = peak, jnp.zeros_like(peak), jnp.zeros(queries.shape, jnp.float32)
        key_blocks = jnp.minimum(jnp.max(first) + block - 1, tokens - 1) // key_block + 1
        _, total, out = jax.lax.fori_loop(0, key_blocks, attend_keys, state)
        return (out / total).astype(query.dtype)

    out = jax.lax.map(attend_block, (jnp.arange(blocks), grouped))
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * block, heads, head_dim)[:, :chunk]
