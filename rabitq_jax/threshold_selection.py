"""The tokens that thresholds on noisy logits keep, and the weight of those that they leave out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import top_p as top_p_kernels
from rabitq_jax._dispatch import select
from rabitq_jax.thresholds import LEAST_DEVIATION, HeadMass, NoisyLogits, Thresholds, threshold_of
from rabitq_jax.top_p import list_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Tokens to attend.

    Attributes:
      indices, counts, scored: as in `Selection`.
      left_out: float32 [B,K,G], sum of the debiased weights of the scored tokens that a query head does not keep, in
        units of e^peak.
    """

    indices: jax.Array
    counts: jax.Array
    scored: jax.Array
    left_out: jax.Array


def keep_by_thresholds_reference(noisy: NoisyLogits, mass: HeadMass, thresholds: Thresholds, length) -> Kept:
    """`keep_by_thresholds` in plain jnp: its definition."""
    scored = noisy.scored
    left_out = scored & is_left_out(noisy, thresholds)
    indices, counts = list_tokens(scored & ~left_out, scored[:, 0, 0], length)
    return Kept(indices=indices, counts=counts, **_sums(noisy, mass, left_out))


def is_left_out(noisy: NoisyLogits, thresholds: Thresholds):
    """bool [B,K,G,T]: below its own threshold, and finite."""
    bulk, single = thresholds.bulk[..., None], thresholds.single[..., None]
    threshold = threshold_of(bulk, single, thresholds.deviations, noisy.deviation)
    return (noisy.scores < threshold) & (noisy.scores > -jnp.inf)


def _sums(noisy: NoisyLogits, mass: HeadMass, left_out) -> dict[str, jax.Array]:
    weight = jnp.exp(noisy.scores - noisy.deviation**2 / 2 - mass.peak[..., None])
    return {
        "scored": jnp.sum(noisy.scored & ~left_out, axis=-1, dtype=jnp.int32),
        "left_out": jnp.sum(jnp.where(left_out, weight, 0), axis=-1),
    }


def _keep_pallas(noisy: NoisyLogits, mass: HeadMass, thresholds: Thresholds, length) -> Kept:
    """The list by kernels; the sums over all tokens by XLA, whose reductions are as fast and always in one order."""
    mark = functools.partial(
        top_p_kernels.mark_thresholds_kernel,
        sink=noisy.sink, deviations=thresholds.deviations, least_deviation=LEAST_DEVIATION,
    )  # fmt: skip
    inputs = [noisy.noise, thresholds.bulk, thresholds.single, noisy.scale, noisy.scores]
    indices, counts = top_p_kernels.list_tokens(mark, inputs, noisy.quantized, length, tokens=noisy.scores.shape[-1])
    left_out = noisy.scored & is_left_out(noisy, thresholds)
    return Kept(indices=indices, counts=counts, **_sums(noisy, mass, left_out))


IMPLEMENTATIONS = {"xla": keep_by_thresholds_reference, "pallas": _keep_pallas}


def keep_by_thresholds(
    noisy: NoisyLogits, mass: HeadMass, thresholds: Thresholds, length, *, implementation=None
) -> Kept:
    """The tokens that each kv head attends: those that a query head of its group keeps, the sinks and the window.

    Args:
      length: int32 [B], tokens in the cache.
      implementation: "xla", "pallas" or None.

    Raises:
      NotImplementedError: the kernel cannot take the shape.
    """
    return select(IMPLEMENTATIONS, implementation, gpu="pallas")(noisy, mass, thresholds, length)
