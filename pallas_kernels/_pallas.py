"""What the portable kernels share: how Pallas is called, and sizes that its Triton lowering takes."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


def interpret() -> bool:
    """Kernels are interpreted where there is no GPU to compile them for."""
    return jax.default_backend() != "gpu"


def call(kernel, *, name: str, num_warps: int = 4, num_stages: int = 2, **kwargs):
    """pl.pallas_call with the Triton lowering named: JAX versions differ in their choice without it."""
    params = plt.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, name=name, compiler_params=params, interpret=interpret(), **kwargs)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; every value in a kernel has such a size."""
    return 1 << (n - 1).bit_length()


def block_of(tokens: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides a capacity.

    Raises:
      NotImplementedError: it is below 16.
    """
    block = min(largest, tokens & -tokens)
    if block < 16:
        raise NotImplementedError(f"the kernel takes capacities that are multiples of 16 tokens, got {tokens}")
    return block


def per_sequence(kv_heads: int):
    """The entry of a sequence, of an array [B], for programs (kv head, i)."""
    return pl.BlockSpec((None,), lambda row, i: (row // kv_heads,))


def per_head(array, kv_heads: int):
    """A kv head's part of an array [B,K,...], whole, for programs (kv head, i)."""
    shape = array.shape[2:]
    return pl.BlockSpec((None, None, *shape), lambda row, i: (row // kv_heads, row % kv_heads, *(0,) * len(shape)))


def load_masked(ref, index, mask, other: float = 0):
    """Load `ref[index]` where mask holds, `other` elsewhere; index is a tuple of integer arrays of mask's shape."""
    return plt.load(ref.at[index], mask=mask, other=other)


def store_masked(ref, index, value, mask):
    """Store `value` to `ref[index]` where mask holds; index is a tuple of integer arrays of value's shape."""
    if interpret():
        # The interpreter writes old values back where the mask is off, over new ones at the same place.
        index = (*index[:-1], jnp.where(mask, index[-1], jnp.iinfo(jnp.int32).max))
    plt.store(ref.at[index], value, mask=mask)


def dot(a, b):
    """a @ b accumulated in float32; float32 operands are split in three TF32 products, which lose next to nothing."""
    precision = None
    if a.dtype == jnp.float32:
        # Plain float32 products have no tensor core, and take the compiler half a minute at 256 dimensions.
        precision = "highest" if interpret() else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def dot_wide(a, b):
    """a @ b for a float32 b; a bfloat16 `a` is multiplied with 16 bits of b, in two products, which is faster."""
    if a.dtype != jnp.bfloat16 or interpret():
        return dot(a.astype(jnp.float32), b)
    high = b.astype(jnp.bfloat16)
    return dot(a, high) + dot(a, (b - high.astype(jnp.float32)).astype(jnp.bfloat16))
