"""The exact part of a decode step's softmax: the mass of the tokens that have no code, or are attended in any case."""

import jax
import jax.numpy as jnp

from pallas_kernels import exact_logsumexp as exact_logsumexp_kernel
from rabitq_jax._dispatch import select


def exact_logsumexp_reference(query, keys, quantized, length, *, sink: int, window: int, softmax_scale: float):
    """`exact_logsumexp` in plain jnp: its definition."""
    capacity = keys.shape[2]
    size, sink = min(window, capacity), min(sink, capacity)
    window_start = jnp.minimum(quantized, capacity - size)
    window_keys = jax.vmap(lambda k, start: jax.lax.dynamic_slice_in_dim(k, start, size, axis=1))(keys, window_start)
    exact_keys = jnp.concatenate([keys[:, :, :sink], window_keys], axis=2)
    sink_position = jnp.broadcast_to(jnp.arange(sink), (keys.shape[0], sink))
    window_position = window_start[:, None] + jnp.arange(size)
    # A token of the window that is also a sink counts once.
    in_window = window_position >= jnp.maximum(quantized, sink)[:, None]
    visible = jnp.concatenate([sink_position, window_position], axis=1) < length[:, None]
    visible &= jnp.concatenate([jnp.ones_like(sink_position, bool), in_window], axis=1)
    logits = softmax_scale * jnp.einsum(
        "bkgd,bksd->bkgs", query.astype(keys.dtype), exact_keys,
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jax.nn.logsumexp(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=-1)


IMPLEMENTATIONS = {"xla": exact_logsumexp_reference, "pallas": exact_logsumexp_kernel.exact_logsumexp}


def exact_logsumexp(
    query, keys, quantized, length, *, sink: int, window: int, softmax_scale: float, implementation=None
) -> jax.Array:
    """log sum exp(softmax_scale <q, k>) over tokens [0, sink) and [quantized, length).

    Args:
      query: [B,K,G,D].
      keys: [B,K,T,D].
      quantized, length: int32 [B]; length at least 1.
      sink: number of first tokens.
      window: static bound on length - quantized.
      softmax_scale: factor from <q, k> to a logit.
      implementation: "xla", "pallas" or None.

    Returns:
      float32 [B,K,G].
    """
    compute = select(IMPLEMENTATIONS, implementation, gpu="pallas")
    return compute(query, keys, quantized, length, sink=sink, window=window, softmax_scale=softmax_scale)
