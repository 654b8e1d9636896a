"""Scores with noise and the tokens that hold a share of the true mass, in two launches; for Hopper GPUs.

score_bins   codes and bit planes -> one byte a score, counts of bins
compact      counts -> limits; bytes -> the list of tokens

and once more, by limits that are given, for heads whose share was verified to be short.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas, mosaic_compact, mosaic_score_bins
from pallas_kernels.gathered_attention import by_row
from pallas_kernels.mosaic_bins import BINS, PLACES
from pallas_kernels.mosaic_certified_threshold import LIMITS, Rule
from pallas_kernels.mosaic_top_p import zeros

__all__ = ["LIMITS", "Rule", "find_again", "load_counts", "score_and_select", "select_again", "zeros"]


def score_and_select(
    planes, factors, base, shift, exact_lse, noise, zeros, bits, scale, bias, bias_gain, quantized, length,
    *, group: int, sink: int, rule: Rule,
):  # fmt: skip
    """Score, and choose.

    Args:
      noise: float32 [B,K,H], nats of deviation for each unit of scale; the others as in
        `mosaic_top_p.score_and_select`.

    Returns:
      Bins int32 [B,K,T/8,G,2]; the state, int32 [B,K,Z], for `load_counts`; and indices int32 [B,K,T], counts int32
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


def select_again(bins, limits, summary, scale, quantized, length, *, sink: int, deviations: float, top_p: float):
    """Indices int32 [B,K,T] and counts int32 [B,K] of the tokens that limits keep, in kv heads where a bound in the
    summary of a `rabitq_jax.certificate.Round` is below p."""
    state = jax.new_ref(jnp.zeros((*limits.shape[:2], mosaic_compact.given_state_words(scale.shape[2])), jnp.int32))
    return mosaic_compact.compact_given(
        bins, limits, summary, scale, state, quantized, length, sink=sink, deviations=deviations, top_p=top_p
    )


def find_again(find, summary, limits, state):
    """Other limits of each query head, found by a portable kernel.

    Args:
      find: function of a query head's number in its group, and references to its part of the other arguments, to
        `LIMITS` numbers.
      summary: float32 [B,K,G,J]; limits: float32 [B,K,H,LIMITS]; state: int32 [B,K,Z].

    Returns:
      float32 [B,K,H,LIMITS], undefined in heads that are not real.
    """

    def kernel(summary_ref, limits_ref, state_ref, out_ref):
        for i, number in enumerate(find(pl.program_id(1), summary_ref, limits_ref, state_ref)):
            out_ref[i] = number

    of_head = lambda row, head: (row, head, 0)  # noqa: E731
    rows = [by_row(x) for x in (summary, limits, state)]
    out = _pallas.call(
        kernel,
        name="lower_limits",
        grid=(rows[0].shape[0], summary.shape[2]),
        in_specs=[
            pl.BlockSpec((None, None, summary.shape[-1]), of_head),
            pl.BlockSpec((None, None, LIMITS), of_head),
            pl.BlockSpec((None, state.shape[-1]), lambda row, head: (row, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, LIMITS), of_head),
        out_shape=jax.ShapeDtypeStruct(rows[1].shape, jnp.float32),
    )(*rows)
    return out.reshape(limits.shape)


def load_counts(state_ref, head):
    """In a portable kernel, from a kv head's state [Z]: the sum of the tokens' places in each bin of debiased logits,
    from 0 at its upper edge to 1, and how many they are; from the worst bin up, behind a zero: two float32 [256]."""
    place = jnp.arange(BINS)
    at = 2 * (head * BINS + BINS - place)
    places, counts = (_pallas.load_masked(state_ref, (at + i,), place > 0).astype(jnp.float32) for i in range(2))
    return places / PLACES, counts
