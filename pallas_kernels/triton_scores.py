"""The population-count score kernel of popcount_scores.py written in Triton and called through jax-triton.

Needs the extra `triton` and a GPU: importing jax_triton fails without them.
"""

import jax
import jax.numpy as jnp
import jax_triton  # pyright: ignore[reportMissingImports]
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pallas_kernels import _pallas
from pallas_kernels.popcount_scores import BLOCK_TOKENS, bit_planes


@triton.jit
def _popcount(x):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _kernel(
    length_ptr, planes_ptr, sums_ptr, gain_ptr, shift_ptr, bits_ptr, scale_ptr, bias_ptr, out_ptr,
    kv_heads: tl.constexpr, group: tl.constexpr, words: tl.constexpr, tokens: tl.constexpr, centroids: tl.constexpr,
    bias_gain: tl.constexpr, has_bias: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * block
    if start < tl.load(length_ptr + head // kv_heads):
        token = start + tl.arange(0, block)
        scale = tl.load(scale_ptr + head * tokens + token).to(tl.float32)
        if has_bias:
            bias = bias_gain * tl.load(bias_ptr + head * tokens + token).to(tl.float32)
        for g in tl.static_range(group):
            query = head * group + g
            dots = tl.zeros((block,), tl.int32)
            for w in tl.static_range(words):
                code = tl.load(bits_ptr + (head * tokens + token) * words + w)
                plane_ptr = planes_ptr + query * 4 * words + w
                dots += _popcount(code & tl.load(plane_ptr))
                dots += _popcount(code & tl.load(plane_ptr + words)) * 2
                dots += _popcount(code & tl.load(plane_ptr + 2 * words)) * 4
                dots -= _popcount(code & tl.load(plane_ptr + 3 * words)) * 8
            scores = (2 * dots - tl.load(sums_ptr + query)).to(tl.float32) * tl.load(gain_ptr + query) * scale
            if has_bias:
                scores += bias
            shift = tl.load(shift_ptr + query * centroids + token // (tokens // centroids))
            tl.store(out_ptr + query * tokens + token, scores + shift)


def proxy_scores(levels, bits, gain, scale, bias, bias_gain, shift, *, length):
    """`rabitq_jax.scores.proxy_scores_reference` for the first length[b] tokens of sequence b; the rest is undefined.

    Raises:
      NotImplementedError: T is not a multiple of 16.
    """
    batch, kv_heads, group, _ = levels.shape
    tokens, words = bits.shape[2:]
    block = _pallas.block_of(tokens, BLOCK_TOKENS)
    return jax_triton.triton_call(
        length, bit_planes(levels), jnp.sum(levels, axis=-1, dtype=jnp.int32), gain, shift,
        jax.lax.bitcast_convert_type(bits, jnp.int32), scale, scale if bias is None else bias,
        kernel=_kernel,
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, group, tokens), jnp.float32),
        grid=(batch * kv_heads, tokens // block),
        kv_heads=kv_heads, group=group, words=words, tokens=tokens, centroids=shift.shape[-1],
        bias_gain=float(bias_gain), has_bias=bias is not None, block=block,
    )  # fmt: skip
