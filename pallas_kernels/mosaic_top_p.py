"""Scores and Top-p selection in one go, for Hopper GPUs.

score_bins   (Mosaic GPU)  codes and INT4 queries -> one byte a score, counts of bins, the largest score
threshold, mark, write     as in top_p.py, from bytes instead of scores
"""

import functools

from pallas_kernels import mosaic_score_bins
from pallas_kernels import top_p as top_p_kernels


def takes(bits, key_centroids) -> bool:
    """Whether the kernel takes codes [B,K,T,W] with centroids [B,K,C,D]."""
    tokens, words = bits.shape[2:]
    return mosaic_score_bins.takes(tokens, words, key_centroids.shape[2])


def score_and_select(
    levels, bits, gain, scale, bias, bias_gain, shift, base, exact_lse, quantized, length, *, sink, top_p: float
):
    """`rabitq_jax.scores.proxy_scores_reference`, then `rabitq_jax.top_p.select_reference`: a superset of its tokens.

    Args:
      base: float32 [B,K,G], where the bins begin; best a little above the largest score, and correct in any case.

    Returns:
      indices int32 [B,K,T], counts int32 [B,K], scored int32 [B,K,G], mass float32 [B,K,G].

    Raises:
      NotImplementedError: `takes` is False.
    """
    bins, counts, peak = mosaic_score_bins.score_bins(
        levels, bits, gain, scale, bias, bias_gain, shift, base, first=sink, stop=quantized
    )
    kept_bins, n_scored, mass = top_p_kernels.kept_bins_of(
        counts, base, peak, exact_lse,
        bins=mosaic_score_bins.BINS, bins_per_nat=mosaic_score_bins.BINS_PER_NAT, top_p=top_p,
    )  # fmt: skip
    mark = functools.partial(top_p_kernels.mark_bins_kernel, sink=sink)
    indices, n_attended = top_p_kernels.list_tokens(mark, [kept_bins, bins], quantized, length, tokens=bits.shape[2])
    return indices, n_attended, n_scored, mass
