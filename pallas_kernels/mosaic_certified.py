"""Attention by the tokens that hold a share of the true mass, and what is verified of it; for Hopper GPUs.

score_bins           codes and bit planes -> one byte a score, counts of bins
compact              counts -> limits; bytes -> the list of tokens
gathered_attention   exact attention in parts, and sums over what each query head found
verify               parts -> outputs; sums -> certificates, limits of a second round
extend               kv heads of which a query head is short: all of that anew, by lower limits
"""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_attention, mosaic_compact, mosaic_extend, mosaic_score_bins, mosaic_verify
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.mosaic_top_p import zeros

__all__ = ["Rule", "attend", "attend_again", "score_and_select", "select_again", "zeros"]


def score_and_select(
    planes, factors, base, shift, exact_lse, noise, state, bits, scale, bias, bias_gain, quantized, length,
    *, group: int, sink: int, rule: Rule,
):  # fmt: skip
    """Score, and choose.

    Args:
      noise: float32 [B,K,H], nats of deviation for each unit of scale; state: a reference to zeros; the others as in
        `mosaic_top_p.score_and_select`.

    Returns:
      Bins int32 [B,K,T/8,G,2]; indices, counts and limits, as `mosaic_compact.compact_noisy` gives them.

    Raises:
      NotImplementedError: `mosaic_top_p.takes` is False.
    """
    bins = mosaic_score_bins.score_bins(
        planes, factors, base, shift, bits, scale, bias, bias_gain, state,
        group=group, first=sink, stop=quantized, noise=noise,
    )  # fmt: skip
    chosen = mosaic_compact.compact_noisy(
        bins, base, exact_lse, noise, scale, state, quantized, length, sink=sink, rule=rule
    )
    return bins, chosen


def attend(
    query, keys, values, indices, counts, bins, scale, quantized, limits, state,
    *, softmax_scale: float, sink: int, rule: Rule, dtype,
):  # fmt: skip
    """Attention over lists, with outputs of a dtype.

    Returns:
      What `mosaic_verify.verify` gives, and the parts of `mosaic_attention.attend`.

    Raises:
      NotImplementedError: `mosaic_attention.takes` is False.
    """
    known = mosaic_attention.Known(bins=bins, scale=scale, quantized=quantized, limits=limits, rule=rule, sink=sink)
    _, partial = mosaic_attention.attend(query, keys, values, indices, counts, softmax_scale=softmax_scale, known=known)
    verified = mosaic_verify.verify(
        partial, counts, scale, quantized, limits, state,
        group=query.shape[2], head_dim=query.shape[3], sink=sink, rule=rule, dtype=dtype,
    )  # fmt: skip
    return *verified, partial


def attend_again(
    query, keys, values, bins, scale, quantized, length, limits, short, state, out, summary,
    *, softmax_scale: float, sink: int, rule: Rule,
):  # fmt: skip
    """Output and summary of `attend`, and what a second round makes of them; arguments as of `mosaic_extend.extend`."""
    out, summary = jax.new_ref(out), jax.new_ref(summary)
    mosaic_extend.extend(
        query, keys, values, bins, scale, quantized, length, limits, short, state, out, summary,
        sink=sink, softmax_scale=softmax_scale, rule=rule,
    )  # fmt: skip
    return jax.freeze(out), jax.freeze(summary)


def select_again(bins, limits, short, scale, quantized, length, *, sink: int, deviations: float):
    """Indices int32 [B,K,T] and counts int32 [B,K] of the tokens that limits of a second round keep, in kv heads of
    which a query head is short."""
    state = jax.new_ref(jnp.zeros((*limits.shape[:2], mosaic_compact.given_state_words(scale.shape[2])), jnp.int32))
    return mosaic_compact.compact_given(
        bins, limits, short, scale, state, quantized, length, sink=sink, deviations=deviations
    )
