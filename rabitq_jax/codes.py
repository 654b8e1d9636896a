"""Key codes and INT4 queries: the two sides of RaBitQ's estimate (design.md section 3; RaBitQ, arXiv 2405.12497).

    key    x = P (k - c_k);   bit i = [x_i > 0];   scale = |x|_2^2 / |x|_1;   bias = <c_q, k - c_k>
    query  y = P (q - c_q);   u = round(y / step) in [-7, 7],   E[u step] = y with random rounding

    <q, k>  ~=  scale step (2 <u, bits> - sum(u))  +  bias  +  <q, c_k>                                   (1)

`scale` is RaBitQ's norm |x| over its debiasing factor <o, o_bar>, in one number: the sqrt(D) cancels. Bit i of word w
is dimension 32 w + i.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import quantize_keys as quantize_keys_kernel
from pallas_kernels import threefry
from rabitq_jax._dispatch import select
from rabitq_jax.config import QueryRounding

QUERY_LEVEL = 7
WORD = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyCodes:
    """Codes of one layer's cached keys. Slots at or past the quantized length are undefined.

    Attributes:
      bits: uint32 [B,K,T,W], the signs of the rotated, centred keys.
      scale: bfloat16 [B,K,T].
      bias: bfloat16 [B,K,T], <c_q, k - c_k>; None when c_q is zero.
      key_centroids: bfloat16 [B,K,C,D], c_k: C = T / interval (one a block), or 1 (the prompt's).
      query_centroid: float32 [B,K,D], c_q; None when it is zero.
      rotation: float32 [32 W, D], P.
    """

    bits: jax.Array
    scale: jax.Array
    bias: jax.Array | None
    key_centroids: jax.Array
    query_centroid: jax.Array | None
    rotation: jax.Array

    @property
    def tokens_per_centroid(self) -> int:
        return self.bits.shape[2] // self.key_centroids.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that scoring one token of one kv head reads, its block's centroid not counted."""
        words = self.bits.shape[-1]
        return 4 * words + 2 + (0 if self.bias is None else 2)

    @property
    def centroid_bytes_per_token(self) -> float:
        """A token's share of the bytes of its block's centroid."""
        return self.key_centroids.shape[-1] * self.key_centroids.dtype.itemsize / self.tokens_per_centroid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Query:
    """Rotated queries in signed INT4: y ~= step * levels.

    Attributes:
      levels: int8 [B,K,G,32 W], integers in [-7, 7].
      step: float32 [B,K,G].
    """

    levels: jax.Array
    step: jax.Array


def pack_bits(positive: jax.Array) -> jax.Array:
    """Pack booleans [..., 32 W] into uint32 [..., W], bit i of word w from element 32 w + i."""
    words = positive.reshape(*positive.shape[:-1], -1, WORD).astype(jnp.uint32)
    return jnp.sum(words << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def unpack_signs(bits: jax.Array) -> jax.Array:
    """Unpack uint32 [..., W] into float32 signs [..., 32 W], +1 for a set bit and -1 for a clear one."""
    ones = (bits[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return (2 * ones.astype(jnp.float32) - 1).reshape(*bits.shape[:-1], -1)


def round_to_bfloat16(x: jax.Array) -> jax.Array:
    """x in bfloat16. XLA leaves a plain cast out where the value goes back to float32 in the same program."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def encode_keys(keys, centroid, rotation, query_centroid=None):
    """Code keys against a centroid: the definition of a code.

    Args:
      keys: [..., n, D].
      centroid: [..., 1, D], c_k.
      rotation: float32 [32 W, D], P.
      query_centroid: None (c_q = 0) or [..., 1, D].

    Returns:
      bits uint32 [..., n, W], scale bfloat16 [..., n], bias bfloat16 [..., n] or None. A key that equals its centroid
      has scale 0; a key with a NaN or an infinity has scale NaN, which no selection drops.
    """
    residual = keys.astype(jnp.float32) - centroid.astype(jnp.float32)
    rotated = jnp.einsum("...nd,cd->...nc", residual, rotation, precision="highest")
    l1 = jnp.sum(jnp.abs(rotated), axis=-1)
    l2 = jnp.sum(rotated * rotated, axis=-1)
    scale = jnp.where(l1 == 0, 0.0, l2 / l1).astype(jnp.bfloat16)
    bias = None
    if query_centroid is not None:
        bias = jnp.sum(residual * query_centroid, axis=-1).astype(jnp.bfloat16)
    return pack_bits(rotated > 0), scale, bias


def quantize_query(query, rotation, query_centroid, *, rounding: QueryRounding, key=None, layer: int = 0) -> Int4Query:
    """Rotate queries and quantize them to signed INT4.

    Args:
      query: [B,K,G,D].
      rotation: float32 [32 W, D], P.
      query_centroid: float32 [B,K,D] or None.
      rounding: "random": floor(y / step + uniform), so that E[u step] = y; "nearest".
      key: PRNG key, needed by "random" alone.
      layer: layers that share a key round independently.

    Raises:
      ValueError: rounding is "random" and there is no key.
    """
    centred = query.astype(jnp.float32)
    if query_centroid is not None:
        centred = centred - query_centroid[:, :, None, :]
    rotated = jnp.einsum("bkgd,cd->bkgc", centred, rotation, precision="highest")
    step = jnp.max(jnp.abs(rotated), axis=-1) / QUERY_LEVEL
    ratio = rotated / jnp.where(step == 0, 1.0, step)[..., None]
    noise = 0.5
    seed = rounding_seed(rounding, key)
    if seed is not None:
        noise = threefry.uniform(seed, jnp.arange(ratio.size, dtype=jnp.uint32).reshape(ratio.shape), layer)
    # The uniform number is below 1 - 2^-23, but the sum may still round up to 8.
    levels = jnp.minimum(jnp.floor(ratio + noise), QUERY_LEVEL)
    return Int4Query(levels=levels.astype(jnp.int8), step=step)


def rounding_seed(rounding: QueryRounding, key: jax.Array | None) -> jax.Array | None:
    """uint32 [2], the seed of random rounding's numbers; None for rounding to nearest.

    Raises:
      ValueError: rounding is "random" and there is no key.
    """
    if rounding == "nearest":
        return None
    if key is None:
        raise ValueError("query_rounding 'random' needs a PRNG key: pass key=jax.random.key(...), or use 'nearest'")
    if jax.random.key_impl(key) == "threefry2x32":
        return jax.random.key_data(key)
    return jax.random.bits(key, (2,), jnp.uint32)


def update_codes_reference(keys, codes: KeyCodes, first_block, stop_block, *, interval: int, max_blocks: int):
    """`update_codes` in plain jnp: its definition."""
    head_dim = keys.shape[-1]
    tokens = max_blocks * interval

    def one_sequence(keys, bits, scale, bias, centroids, query_centroid, first, stop):
        # A slice that would pass the end is moved back, and the mask with it: only blocks in [first, stop) change.
        start = jnp.minimum(first, keys.shape[1] // interval - max_blocks)
        block = start + jnp.arange(max_blocks)
        changed = (block >= first) & (block < stop)
        per_token = jnp.repeat(changed, interval)

        def cut(array, size, index):
            return jax.lax.dynamic_slice_in_dim(array, index, size, axis=1)

        def put(array, new, index, mask):
            old = cut(array, new.shape[1], index)
            mask = mask.reshape(1, -1, *(1,) * (new.ndim - 2))
            return jax.lax.dynamic_update_slice_in_dim(array, jnp.where(mask, new, old), index, axis=1)

        new_keys = cut(keys, tokens, start * interval).reshape(keys.shape[0], max_blocks, interval, head_dim)
        if centroids.shape[1] > 1:
            centroid = round_to_bfloat16(jnp.mean(new_keys.astype(jnp.float32), axis=2, keepdims=True))
            centroids = put(centroids, centroid[:, :, 0], start, changed)
        else:
            centroid = centroids[:, None]
        c_q = None if query_centroid is None else query_centroid[:, None, None]
        new_bits, new_scale, new_bias = encode_keys(new_keys, centroid, codes.rotation, c_q)
        flat = lambda x: x.reshape(x.shape[0], tokens, *x.shape[3:])  # noqa: E731
        bits = put(bits, flat(new_bits), start * interval, per_token)
        scale = put(scale, flat(new_scale), start * interval, per_token)
        if bias is not None:
            bias = put(bias, flat(new_bias), start * interval, per_token)
        return bits, scale, bias, centroids

    bits, scale, bias, centroids = jax.vmap(one_sequence)(
        keys, codes.bits, codes.scale, codes.bias, codes.key_centroids, codes.query_centroid, first_block, stop_block
    )
    return dataclasses.replace(codes, bits=bits, scale=scale, bias=bias, key_centroids=centroids)


def _update_codes_pallas(keys, codes: KeyCodes, first_block, stop_block, *, interval: int, max_blocks: int):
    bits, scale, bias, centroids = quantize_keys_kernel.quantize_keys(
        keys,
        codes.bits,
        codes.scale,
        codes.bias,
        codes.key_centroids,
        codes.query_centroid,
        codes.rotation,
        first_block,
        stop_block,
        interval=interval,
        max_blocks=max_blocks,
    )
    return dataclasses.replace(codes, bits=bits, scale=scale, bias=bias, key_centroids=centroids)


UPDATE_IMPLEMENTATIONS = {"xla": update_codes_reference, "pallas": _update_codes_pallas}


def update_codes(
    keys, codes: KeyCodes, first_block, stop_block, *, interval: int, max_blocks: int, implementation=None
):
    """Quantize blocks [first_block, stop_block) of every sequence; the other codes stay as they are.

    Args:
      keys: [B,K,T,D], exact.
      codes: of capacity T, a multiple of `interval`.
      first_block, stop_block: int32 [B], in blocks of `interval` tokens; stop - first <= max_blocks.
      max_blocks: static bound on the work.
      implementation: "xla", "pallas" or None.

    Returns:
      KeyCodes with the new bits, scales, biases and, for block centroids, centroids.
    """
    if max_blocks == 0:
        return codes
    update = select(UPDATE_IMPLEMENTATIONS, implementation, gpu="pallas")
    return update(keys, codes, first_block, stop_block, interval=interval, max_blocks=max_blocks)
