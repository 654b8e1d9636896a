"""Scores with noise and the tokens that hold a share of the true mass, in two launches; for Hopper GPUs.

score_bins   codes and bit planes -> one byte a score, weights of bins
compact      weights -> limits; bytes -> the list of tokens

and once more, by limits that are given, for heads whose share was verified to be short.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, mosaic_compact, mosaic_score_bins
from pallas_kernels.mosaic_certified_threshold import LIMITS, Rule
from pallas_kernels.mosaic_top_p import zeros

__all__ = ["LIMITS", "Rule", "load_spreads", "score_and_select", "select_again", "zeros"]


def score_and_select(
    planes, factors, base, shift, exact_lse, noise, zeros, bits, scale, bias, bias_gain, quantized, length,
    *, group: int, sink: int, rule: Rule,
):  # fmt: skip
    """Score, and choose.

    Args:
      noise: float32 [B,K,H], nats of deviation for each unit of scale; the others as in
        `mosaic_top_p.score_and_select`.

    Returns:
      Bins int32 [B,K,G,T/4]; the state, int32 [B,K,Z], for `load_spreads`; and indices int32 [B,K,T], counts int32
      [B,K] and limits float32 [B,K,H,LIMITS].

    Raises:
      NotImplementedError: `mosaic_top_p.takes` is False.
    """
    state = jax.new_ref(zeros)
    bins = mosaic_score_bins.score_bins(
        planes, factors, base, shift, bits, scale, bias, bias_gain, state,
        group=group, first=sink, stop=quantized, noise=noise,
    )  # fmt: skip
    chosen = mosaic_compact.compact_noisy(
        bins, base, exact_lse, noise, scale, state, quantized, length, sink=sink, rule=rule
    )
    return bins, jax.freeze(state), chosen


def select_again(bins, limits, rows, scale, quantized, length, *, sink: int, deviations: float):
    """Indices int32 [B,K,T] and counts int32 [B,K] of the tokens that limits keep, in the kv heads bool [B,K] alone."""
    batch, kv_heads, heads = limits.shape[:3]
    state = jax.new_ref(jnp.zeros((batch, kv_heads, zeros(batch, kv_heads, heads, scale.shape[2])), jnp.int32))
    return mosaic_compact.compact_given(
        bins, limits, rows.astype(jnp.int32), scale, state, quantized, length, sink=sink, deviations=deviations
    )


def load_spreads(state_ref, head):
    """In a portable kernel, from a kv head's state [Z]: sums of e^(sd^2 / 2) over the tokens of each bin of z - sd^2,
    less for those below its upper edge, from the worst bin up, behind a zero: float32 [256]."""
    place = jnp.arange(mosaic_score_bins.BINS)
    at = 2 * (head * mosaic_score_bins.BINS + mosaic_score_bins.BINS - place)
    low, high = (_pallas.load_masked(state_ref, (at + i,), place > 0) for i in range(2))
    unsigned = jnp.where(low < 0, 2.0**32, 0.0) + low.astype(jnp.float32)
    return (unsigned + 2.0**32 * high.astype(jnp.float32)) * mosaic_score_bins.MASS_UNIT
