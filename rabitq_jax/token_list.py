"""A mask of tokens as a list, the form in which gathered attention takes them."""

import jax
import jax.numpy as jnp

from pallas_kernels import top_p as top_p_kernels
from rabitq_jax._dispatch import select


def list_tokens_reference(mask, length):
    """`list_tokens` by a sort: its definition."""
    tokens = mask.shape[-1]
    position = jnp.arange(tokens, dtype=jnp.int32)
    listed = mask & (position < length[:, None, None])
    indices = jnp.sort(jnp.where(listed, position, tokens), axis=-1)
    return indices, jnp.sum(listed, axis=-1, dtype=jnp.int32)


IMPLEMENTATIONS = {"xla": list_tokens_reference, "pallas": top_p_kernels.list_mask}


def list_tokens(mask, length, *, implementation=None) -> tuple[jax.Array, jax.Array]:
    """The tokens of a mask, in ascending order.

    Args:
      mask: bool [B,K,T].
      length: int32 [B]; tokens from there on are not listed.
      implementation: "xla" (a sort), "pallas" (a count of the tokens before each) or None.

    Returns:
      Indices int32 [B,K,T] and counts int32 [B,K], as in `Selection`.

    Raises:
      NotImplementedError: the kernel was named, and T is not a multiple of 32.
    """
    return select(IMPLEMENTATIONS, implementation, gpu="pallas")(mask, length)
