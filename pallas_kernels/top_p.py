"""Top-p selection without a sort: scores fall into bins of 1/32 nat below the head's largest score.

    histogram   program (kv head, block): counts of scores a bin, for each query head
    threshold   program (query head): running sums over the bins, best first, give the last bin that is kept
    mark        program (kv head, block): tokens in kept bins of any query head, sinks and window -> bit mask, counts
    (XLA)       running sum of the counts over blocks: where each block's tokens go in the list
    write       program (kv head, block): the mask's tokens, to the list

Counts are integers, so every run gives the same list. Mass is p or more whatever the rounding: a kept bin counts with
its lower edge, a dropped one with its upper edge. The last bin holds everything more than 32 nats below the largest
score.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.ref import addupdate

from pallas_kernels import _pallas

BINS = 1024
BINS_PER_NAT = 32
BLOCK_TOKENS = 1024
# Covers float32 rounding in bin edges and running sums.
SLACK = 1e-5


def bin_of(score, peak):
    """int32 bin of a float32 score: 0 at the peak, BINS - 1 from 32 nats below it; NaN and infinities in bin 0."""
    depth = (peak - score) * BINS_PER_NAT
    return jnp.where(depth >= 0, jnp.minimum(depth, BINS - 1.0), 0.0).astype(jnp.int32)


def _scored(token, quantized, sink):
    return (token >= sink) & (token < quantized)


def _histogram_kernel(quantized_ref, peak_ref, scores_ref, _, counts_ref, *, block, sink):
    """quantized [], peak [G], scores [G,T] -> counts [G, 2 BINS], added to; slot BINS takes what is not scored."""
    start = pl.program_id(1) * block
    quantized = quantized_ref[...]

    @pl.when((start < quantized) & (start + block > sink))
    def _():
        scored = _scored(start + jnp.arange(block, dtype=jnp.int32), quantized, sink)
        for g in range(scores_ref.shape[0]):
            place = jnp.where(scored, bin_of(scores_ref[g, pl.ds(start, block)], peak_ref[g]), BINS)
            addupdate(counts_ref, (g, place), jnp.ones((block,), jnp.int32))


def _threshold_kernel(counts_ref, peak_ref, exact_lse_ref, kept_bins_ref, scored_ref, mass_ref, *, top_p):
    """counts [2 BINS], peak and exact_lse [] -> number of bins kept [], tokens in them [], estimated mass share []."""
    counts = counts_ref[pl.ds(0, BINS)]
    place = jnp.arange(BINS, dtype=jnp.int32)
    n = counts.astype(jnp.float32)
    upper = n * jnp.exp(place.astype(jnp.float32) * (-1.0 / BINS_PER_NAT))
    lower = jnp.where(place == BINS - 1, 0.0, upper * jnp.exp(-1.0 / BINS_PER_NAT))
    # Masses are relative to the peak; an exact mass far above it needs no more precision than this.
    exact = jnp.exp(jnp.minimum(exact_lse_ref[...] - peak_ref[...], 60.0))
    all_upper = jnp.sum(upper)

    def enough(kept_lower, kept_upper):
        dropped = jnp.maximum(all_upper - kept_upper, 0.0)
        return exact + kept_lower >= top_p * (1 + SLACK) * (exact + kept_lower + dropped)

    kept_lower, kept_upper = jnp.cumsum(lower), jnp.cumsum(upper)
    if top_p == 1:
        kept_bins = jnp.full((), BINS, jnp.int32)
    else:
        # The test holds from some bin on. With NaN it holds nowhere, and everything is kept.
        short = jnp.sum((~enough(kept_lower, kept_upper)).astype(jnp.int32))
        kept_bins = jnp.where(enough(0.0, 0.0), 0, jnp.minimum(short + 1, BINS))
    kept = place < kept_bins
    middle = 0.5 * (upper + lower)
    total = exact + jnp.sum(middle)
    kept_bins_ref[...] = kept_bins
    scored_ref[...] = jnp.sum(jnp.where(kept, counts, 0))
    mass_ref[...] = jnp.where(total == 0, 1.0, (exact + jnp.sum(jnp.where(kept, middle, 0.0))) / total)


def _mark_kernel(quantized_ref, length_ref, kept_bins_ref, peak_ref, scores_ref, mask_ref, count_ref, *, block, sink):
    """quantized, length [], kept_bins and peak [G], scores [G,T] -> mask int32 [T/32], count [] of this block."""
    start = pl.program_id(1) * block
    quantized, length = quantized_ref[...], length_ref[...]

    @pl.when(start >= length)
    def _():
        count_ref[...] = jnp.zeros((), jnp.int32)

    @pl.when(start < length)
    def _():
        shape = (block // 32, 32)
        bit = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        token = start + 32 * jax.lax.broadcasted_iota(jnp.int32, shape, 0) + bit
        scored = _scored(token, quantized, sink)
        wanted = jnp.zeros(shape, jnp.bool_)
        for g in range(scores_ref.shape[0]):
            score = _pallas.load_masked(scores_ref, (g + 0 * token, token), scored, 0.0)
            wanted |= bin_of(score, peak_ref[g]) < kept_bins_ref[g]
        keep = ((scored & wanted) | (~scored & (token < length))).astype(jnp.int32)
        count_ref[...] = jnp.sum(jnp.sum(keep, axis=1))
        mask_ref[pl.ds(start // 32, block // 32)] = jnp.sum(keep << bit, axis=1)


def _write_kernel(length_ref, offset_ref, mask_ref, indices_ref, *, block):
    """length, offset [], mask int32 [T/32] -> indices [T], this block's tokens from offset on."""
    start = pl.program_id(1) * block

    @pl.when(start < length_ref[...])
    def _():
        token = start + jnp.arange(block, dtype=jnp.int32)
        keep = (mask_ref[token // 32] >> (token % 32)) & 1
        place = offset_ref[...] + jnp.cumsum(keep) - 1
        _pallas.store_masked(indices_ref, (place,), token, keep == 1)


def select_top_p(scores, exact_lse, quantized, length, *, sink, top_p):
    """`rabitq_jax.top_p.select_top_p`: a superset of the reference's tokens, in the same order.

    Returns:
      indices int32 [B,K,T], counts int32 [B,K], scored int32 [B,K,G], mass float32 [B,K,G].
    """
    batch, kv_heads, group, tokens = scores.shape
    heads = batch * kv_heads
    block = _pallas.block_of(tokens, BLOCK_TOKENS)
    if block < 32:
        raise NotImplementedError(f"the kernel takes capacities that are multiples of 32 tokens, got {tokens}")
    blocks = tokens // block
    scored = _scored(jnp.arange(tokens), quantized[:, None], sink)[:, None, None]
    # NaN and infinity are above every finite peak, and fall into bin 0.
    peak = jnp.max(jnp.where(scored & jnp.isfinite(scores), scores, -jnp.inf), axis=-1)
    peak = jnp.where(peak == -jnp.inf, jnp.where(exact_lse == -jnp.inf, 0.0, exact_lse), peak)

    per_sequence = pl.BlockSpec((None,), lambda row, i: (row // kv_heads,))
    per_block = pl.BlockSpec((None, None), lambda row, i: (row, i))

    def head(array):
        shape = array.shape[2:]
        return pl.BlockSpec((None, None, *shape), lambda row, i: (row // kv_heads, row % kv_heads, *(0,) * len(shape)))

    def like(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    counts = jnp.zeros((batch, kv_heads, group, 2 * BINS), jnp.int32)
    counts = _pallas.call(
        functools.partial(_histogram_kernel, block=block, sink=sink),
        name="top_p_histogram",
        grid=(heads, blocks),
        in_specs=[per_sequence, head(peak), head(scores), head(counts)],
        out_specs=head(counts),
        out_shape=like(counts.shape, jnp.int32),
        input_output_aliases={3: 0},
    )(quantized, peak, scores, counts)

    per_query_head = pl.BlockSpec((None,), lambda i: (i,))
    flat = (heads * group,)
    kept_bins, scored_count, mass = _pallas.call(
        functools.partial(_threshold_kernel, top_p=top_p),
        name="top_p_threshold",
        grid=flat,
        in_specs=[pl.BlockSpec((None, 2 * BINS), lambda i: (i, 0)), per_query_head, per_query_head],
        out_specs=[per_query_head] * 3,
        out_shape=[like(flat, jnp.int32), like(flat, jnp.int32), like(flat, jnp.float32)],
    )(counts.reshape(*flat, -1), peak.reshape(flat), exact_lse.reshape(flat))
    kept_bins = kept_bins.reshape(peak.shape)

    mask_shape = like((batch, kv_heads, tokens // 32), jnp.int32)
    mask, block_counts = _pallas.call(
        functools.partial(_mark_kernel, block=block, sink=sink),
        name="top_p_mark",
        grid=(heads, blocks),
        in_specs=[per_sequence, per_sequence, head(kept_bins), head(peak), head(scores)],
        out_specs=[head(mask_shape), per_block],
        out_shape=[mask_shape, like((heads, blocks), jnp.int32)],
    )(quantized, length, kept_bins, peak, scores)

    stops = jnp.cumsum(block_counts, axis=1)
    indices_shape = like((batch, kv_heads, tokens), jnp.int32)
    indices = _pallas.call(
        functools.partial(_write_kernel, block=block),
        name="top_p_write",
        grid=(heads, blocks),
        in_specs=[per_sequence, per_block, head(mask_shape)],
        out_specs=head(indices_shape),
        out_shape=indices_shape,
    )(length, stops - block_counts, mask)
    return (
        indices,
        stops[:, -1].reshape(batch, kv_heads),
        scored_count.reshape(peak.shape),
        mass.reshape(peak.shape),
    )
