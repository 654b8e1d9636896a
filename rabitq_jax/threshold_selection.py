"""The tokens that thresholds on noisy logits keep, and the weight of those that they leave out."""

import dataclasses

import jax
import jax.numpy as jnp

from rabitq_jax._dispatch import select
from rabitq_jax.thresholds import HeadMass, NoisyLogits, Thresholds, threshold_of
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
    sd, scored = noisy.deviation, noisy.scored
    below = noisy.scores < threshold_of(
        thresholds.bulk[..., None], thresholds.single[..., None], thresholds.deviations, sd
    )
    left_out = scored & below & jnp.isfinite(noisy.scores)
    weight = jnp.exp(noisy.scores - sd**2 / 2 - mass.peak[..., None])
    keep = scored & ~left_out
    indices, counts = list_tokens(keep, scored[:, 0, 0], length)
    return Kept(
        indices=indices,
        counts=counts,
        scored=jnp.sum(keep, axis=-1, dtype=jnp.int32),
        left_out=jnp.sum(jnp.where(left_out, weight, 0), axis=-1),
    )


IMPLEMENTATIONS = {"xla": keep_by_thresholds_reference}


def keep_by_thresholds(
    noisy: NoisyLogits, mass: HeadMass, thresholds: Thresholds, length, *, implementation=None
) -> Kept:
    """The tokens that each kv head attends: those that a query head of its group keeps, the sinks and the window.

    Args:
      length: int32 [B], tokens in the cache.
      implementation: "xla" or None.
    """
    return select(IMPLEMENTATIONS, implementation, gpu="xla")(noisy, mass, thresholds, length)
