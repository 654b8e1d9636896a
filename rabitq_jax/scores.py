"""Proxy scores: estimated attention logits of an INT4 query against packed key codes, equation (1) of codes.py.

<u, bits> is an exact integer in every implementation; one float32 multiplication and two additions follow it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import int4_scores, popcount_scores
from rabitq_jax._dispatch import select
from rabitq_jax.codes import Int4Query, KeyCodes, unpack_signs


def proxy_scores_reference(levels, bits, gain, scale, bias, bias_gain, shift):
    """Scores from plain arrays: the definition that every kernel is tested against.

    Args:
      levels: int8 [B,K,G,32 W], in [-7, 7].
      bits: uint32 [B,K,T,W].
      gain: float32 [B,K,G], INT4 step times softmax scale.
      scale: bfloat16 [B,K,T].
      bias: bfloat16 [B,K,T] or None.
      bias_gain: python float, softmax scale.
      shift: float32 [B,K,G,C], scaled <q, c_k>; token t has centroid t // (T / C).

    Returns:
      float32 [B,K,G,T]: gain * scale * (2 <u, bits> - sum(u)) + bias_gain * bias + shift.
    """
    # Products of small integers with +-1 are exact in any float32 matmul mode, tf32 included.
    dots = jnp.einsum("bkgd,bktd->bkgt", levels.astype(jnp.float32), unpack_signs(bits))
    scores = dots * gain[..., None] * scale[:, :, None, :].astype(jnp.float32)
    if bias is not None:
        scores = scores + bias_gain * bias[:, :, None, :].astype(jnp.float32)
    return scores + jnp.repeat(shift, bits.shape[2] // shift.shape[-1], axis=-1)


def _triton(*args, **kwargs):
    # jax-triton is an extra, and importing it needs a GPU build of JAX.
    from pallas_kernels import triton_scores

    return triton_scores.proxy_scores(*args, **kwargs)


def _reference(*args, length):
    del length  # the reference scores every slot
    return proxy_scores_reference(*args)


IMPLEMENTATIONS = {
    "xla": _reference,
    "popcount": popcount_scores.proxy_scores,
    "int4": int4_scores.proxy_scores,
    "triton": _triton,
}


def centroid_shift(query: jax.Array, codes: KeyCodes, softmax_scale: float) -> jax.Array:
    """Scaled <q, c_k> for every centroid: float32 [B,K,G,C]."""
    # Products of two bfloat16 are exact in float32.
    dtype = jnp.bfloat16 if query.dtype == jnp.bfloat16 else jnp.float32
    return softmax_scale * jnp.einsum(
        "bkgd,bkcd->bkgc", query.astype(dtype), codes.key_centroids.astype(dtype),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip


def proxy_scores(
    query: jax.Array,
    quantized: Int4Query,
    codes: KeyCodes,
    length: jax.Array,
    *,
    softmax_scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Estimated scaled logits of every token that has a code.

    Args:
      query: [B,K,G,D], exact; enters through <q, c_k> alone.
      quantized: the same queries, rotated, in INT4.
      codes: key codes of capacity T.
      length: int32 [B], number of tokens that have codes.
      softmax_scale: factor from <q, k> to a logit.
      implementation: "xla", "popcount" (AND and population count on 32-bit words), "int4" (int8 tensor-core product),
        "triton" (the popcount kernel through jax-triton), or None: "popcount" on a GPU, "xla" elsewhere.

    Returns:
      float32 [B,K,G,T]. Values at or past `length` are undefined.

    Raises:
      ValueError: shapes disagree.
      NotImplementedError: the kernel cannot take the shape.
    """
    if quantized.levels.shape[-1] != 32 * codes.bits.shape[-1]:
        raise ValueError(
            f"quantized queries have {quantized.levels.shape[-1]} dimensions, codes {32 * codes.bits.shape[-1]} bits"
        )
    shift = centroid_shift(query, codes, softmax_scale)
    score = select(IMPLEMENTATIONS, implementation, gpu="popcount")
    gain = quantized.step * softmax_scale
    return score(quantized.levels, codes.bits, gain, codes.scale, codes.bias, softmax_scale, shift, length=length)
