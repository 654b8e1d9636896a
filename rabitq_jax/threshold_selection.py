"""The tokens that thresholds on noisy logits keep."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import top_p as top_p_kernels
from rabitq_jax._dispatch import select
from rabitq_jax.thresholds import LEAST_DEVIATION, NoisyLogits, Thresholds, threshold_of
from rabitq_jax.token_list import list_tokens_reference
from rabitq_jax.top_p import any_keeps


def keep_by_thresholds_reference(noisy: NoisyLogits, thresholds: Thresholds, length):
    """`keep_by_thresholds` in plain jnp: its definition."""
    scored, bulk, single = noisy.scored, thresholds.bulk[..., None], thresholds.single[..., None]
    threshold = threshold_of(bulk, single, thresholds.deviations, noisy.deviation)
    left_out = (noisy.scores < threshold) & (noisy.scores > -jnp.inf)
    return list_tokens_reference(any_keeps(scored & ~left_out, scored[:, 0, 0]), length)


def _keep_pallas(noisy: NoisyLogits, thresholds: Thresholds, length):
    mark = functools.partial(
        top_p_kernels.mark_thresholds_kernel,
        sink=noisy.sink, deviations=thresholds.deviations, least_deviation=LEAST_DEVIATION,
    )  # fmt: skip
    inputs = [noisy.noise, thresholds.bulk, thresholds.single, noisy.scale, noisy.scores]
    return top_p_kernels.list_marked(mark, inputs, noisy.quantized, length, tokens=noisy.scores.shape[-1])


IMPLEMENTATIONS = {"xla": keep_by_thresholds_reference, "pallas": _keep_pallas}


def keep_by_thresholds(
    noisy: NoisyLogits, thresholds: Thresholds, length, *, implementation=None
) -> tuple[jax.Array, jax.Array]:
    """The tokens that each kv head attends: those that a query head of its group keeps, the sinks and the window.

    Args:
      length: int32 [B], tokens in the cache.
      implementation: "xla", "pallas" or None.

    Returns:
      Indices int32 [B,K,T] and counts int32 [B,K], as in `Selection`.

    Raises:
      NotImplementedError: the kernel cannot take the shape.
    """
    return select(IMPLEMENTATIONS, implementation, gpu="pallas")(noisy, thresholds, length)
