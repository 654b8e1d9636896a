"""Scores and Top-p selection from prepared queries, in two launches; for Hopper GPUs.

score_bins   codes and bit planes -> one byte a score, counts of bins, the largest score
compact      counts -> thresholds; bytes -> the list of tokens
"""

import jax

from pallas_kernels import mosaic_compact, mosaic_score_bins
from pallas_kernels.mosaic_bins import state_words


def takes(bits, key_centroids) -> bool:
    """Whether the kernels take codes [B,K,T,W] with centroids [B,K,C,D]."""
    tokens, words = bits.shape[2:]
    return mosaic_score_bins.takes(tokens, words, key_centroids.shape[2])


def zeros(batch: int, kv_heads: int, heads: int, tokens: int) -> int:
    """Words a kv head that `score_and_select` counts in."""
    return state_words(heads, mosaic_compact.blocks(batch * kv_heads, tokens))


def score_and_select(
    planes, factors, base, shift, exact_lse, zeros, bits, scale, bias, bias_gain, quantized, length,
    *, group: int, sink: int, top_p: float,
):  # fmt: skip
    """`rabitq_jax.scores.proxy_scores_reference`, then `rabitq_jax.top_p.select_reference`: a superset of its tokens.

    Args:
      planes, factors, base, shift, exact_lse, zeros: of `rabitq_jax.prepared_query.PreparedQuery`.
      bits, scale, bias, bias_gain: as in `proxy_scores_reference`.
      quantized, length: int32 [B].
      group: G, the query heads that are real.

    Returns:
      indices int32 [B,K,T], counts int32 [B,K], scored int32 [B,K,G], mass float32 [B,K,G].

    Raises:
      NotImplementedError: `takes` is False.
    """
    state = jax.new_ref(zeros)
    bins = mosaic_score_bins.score_bins(
        planes, factors, base, shift, bits, scale, bias, bias_gain, state, group=group, first=sink, stop=quantized
    )
    indices, counts, scored, mass = mosaic_compact.compact(
        bins, base, exact_lse, state, quantized, length, sink=sink, top_p=top_p
    )
    return indices, counts, scored[:, :, :group], mass[:, :, :group]
