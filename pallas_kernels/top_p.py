"""Top-p selection without a sort: scores fall into bins of 1/32 nat below the head's largest score.

    histogram   program (kv head, block): counts of scores a bin, for each query head
    threshold   program (query head): running sums over the bins, best first, give the last bin that is kept
    mark        program (kv head, block): tokens in kept bins of any query head, sinks and window -> bit mask, count
    list        program (kv head, block): the mask's tokens, to the list, behind those of the blocks before

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
from pallas_kernels.debiased_mass import deviation

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
    """counts [2 BINS], peak, exact_lse [] -> bins kept [], tokens in them [], estimated mass share []."""
    counts = counts_ref[pl.ds(0, BINS)]
    place = jnp.arange(BINS, dtype=jnp.int32)
    # Masses are relative to the largest score, which lies in bin 0.
    step = jnp.exp(jnp.full((), -1.0 / BINS_PER_NAT, jnp.float32))
    upper = counts.astype(jnp.float32) * jnp.exp(place.astype(jnp.float32) * (-1.0 / BINS_PER_NAT))
    lower = jnp.where(place == BINS - 1, 0.0, upper * step)
    lower = jnp.where((place == 0) & (counts > 0), (upper - 1) * step + 1, lower)
    # An exact mass far above the peak needs no more precision than this.
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
    total, dropped = exact + jnp.sum(middle), jnp.sum(jnp.where(kept, 0.0, middle))
    kept_bins_ref[...] = kept_bins
    scored_ref[...] = jnp.sum(jnp.where(kept, counts, 0))
    mass_ref[...] = jnp.where(total == 0, 1.0, 1.0 - dropped / total)


def _mark_scores_kernel(
    quantized_ref, length_ref, kept_bins_ref, peak_ref, scores_ref, mask_ref, count_ref, *, block, sink
):
    """quantized, length [], kept_bins and peak [G], scores [G,T] -> mask int32 [T/32], count [] of this block."""

    def mark(token):
        scored = _scored(token, quantized_ref[...], sink)
        wanted = jnp.zeros(token.shape, jnp.bool_)
        for g in range(scores_ref.shape[0]):
            score = _pallas.load_masked(scores_ref, (g + 0 * token, token), scored)
            wanted |= bin_of(score, peak_ref[g]) < kept_bins_ref[g]
        return (scored & wanted) | (~scored & (token < length_ref[...]))

    _mark_block(mark, 1, length_ref, mask_ref, count_ref, block)


def mark_thresholds_kernel(
    quantized_ref, length_ref, noise_ref, bulk_ref, single_ref, scale_ref, scores_ref, mask_ref, count_ref,
    *, block, sink, deviations, least_deviation,
):  # fmt: skip
    """quantized, length []; noise, bulk and single [G], scale [T], scores [G,T] -> mask int32 [T/32], count []."""

    def mark(token):
        scored = _scored(token, quantized_ref[...], sink)
        scale = _pallas.load_masked(scale_ref, (token,), scored)
        wanted = jnp.zeros(token.shape, jnp.bool_)
        for g in range(scores_ref.shape[0]):
            score = _pallas.load_masked(scores_ref, (g + 0 * token, token), scored)
            sd = deviation(noise_ref[g], scale, least_deviation)
            # What is not finite is always kept.
            threshold = jnp.minimum(bulk_ref[g] - 0.5 * sd * sd, single_ref[g] - deviations * sd)
            wanted |= ~((score < threshold) & (score > -jnp.inf))
        return (scored & wanted) | (~scored & (token < length_ref[...]))

    _mark_block(mark, 1, length_ref, mask_ref, count_ref, block)


def _mark_block(mark, tokens_each, length_ref, mask_ref, count_ref, block):
    """Store a block's mask and the number of its ones; `mark(token)` gives `tokens_each` bits from token on."""
    start = pl.program_id(1) * block

    @pl.when(start >= length_ref[...])
    def _():
        count_ref[...] = jnp.zeros((), jnp.int32)

    @pl.when(start < length_ref[...])
    def _():
        shape = (block // 32, 32 // tokens_each)
        shift = tokens_each * jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        token = start + 32 * jax.lax.broadcasted_iota(jnp.int32, shape, 0) + shift
        mask = jnp.sum(mark(token).astype(jnp.int32) << shift, axis=1)
        count_ref[...] = jnp.sum(jax.lax.population_count(mask))
        mask_ref[pl.ds(start // 32, block // 32)] = mask


def _write_kernel(length_ref, counts_ref, mask_ref, indices_ref, total_ref, *, block):
    """length [], counts of all blocks [N], mask int32 [T/32] -> indices [T], in order of the blocks; total []."""
    i = pl.program_id(1)
    start = i * block
    blocks = counts_ref.shape[0]
    other = jnp.arange(_pallas.power_of_two(blocks), dtype=jnp.int32)
    counts = _pallas.load_masked(counts_ref, (other,), other < blocks)

    @pl.when(i == 0)
    def _():
        total_ref[...] = jnp.sum(counts)

    @pl.when(start < length_ref[...])
    def _():
        offset = jnp.sum(jnp.where(other < i, counts, 0))
        token = start + jnp.arange(block, dtype=jnp.int32)
        keep = (mask_ref[token // 32] >> (token % 32)) & 1
        place = offset + jnp.cumsum(keep) - 1
        _pallas.store_masked(indices_ref, (place,), token, keep == 1)


def select_top_p(scores, exact_lse, quantized, length, *, sink, top_p):
    """`rabitq_jax.top_p.select_top_p`: a superset of the reference's tokens, in the same order.

    Returns:
      indices int32 [B,K,T], counts int32 [B,K], scored int32 [B,K,G], mass float32 [B,K,G].

    Raises:
      NotImplementedError: T is not a multiple of 32.
    """
    scored = _scored(jnp.arange(scores.shape[-1]), quantized[:, None], sink)[:, None, None]
    # NaN and infinity are above every finite peak, and fall into bin 0.
    peak = jnp.max(jnp.where(scored & jnp.isfinite(scores), scores, -jnp.inf), axis=-1)
    peak = jnp.where(peak == -jnp.inf, jnp.where(exact_lse == -jnp.inf, 0.0, exact_lse), peak)
    counts = _histogram(scores, peak, quantized, sink=sink)
    kept_bins, n_scored, mass = _kept_bins(counts, peak, exact_lse, top_p=top_p)
    mark = functools.partial(_mark_scores_kernel, sink=sink)
    indices, n_attended = list_marked(mark, [kept_bins, peak, scores], quantized, length, tokens=scores.shape[-1])
    return indices, n_attended, n_scored, mass


def _block_tokens(tokens):
    block = _pallas.block_of(tokens, BLOCK_TOKENS)
    if block < 32:
        raise NotImplementedError(f"the kernel takes capacities that are multiples of 32 tokens, got {tokens}")
    return block


def _histogram(scores, peak, quantized, *, sink):
    """Scores [B,K,G,T] of tokens in [sink, quantized), counted in bins: int32 [B,K,G, 2 BINS], of which BINS matter."""
    batch, kv_heads, group, tokens = scores.shape
    block = _block_tokens(tokens)
    counts = jnp.zeros((batch, kv_heads, group, 2 * BINS), jnp.int32)
    return _pallas.call(
        functools.partial(_histogram_kernel, block=block, sink=sink),
        name="top_p_histogram",
        grid=(batch * kv_heads, tokens // block),
        in_specs=[_pallas.per_sequence(kv_heads)] + [_pallas.per_head(x, kv_heads) for x in (peak, scores, counts)],
        out_specs=_pallas.per_head(counts, kv_heads),
        out_shape=jax.ShapeDtypeStruct(counts.shape, jnp.int32),
        input_output_aliases={3: 0},
    )(quantized, peak, scores, counts)


def _kept_bins(counts, peak, exact_lse, *, top_p):
    """How many bins, best first, surely hold the share.

    Args:
      counts: int32 [B,K,G, 2 BINS], of which BINS matter.
      peak, exact_lse: float32 [B,K,G]; peak is the largest score.

    Returns:
      Kept bins int32 [B,K,G], tokens in them int32 [B,K,G], estimated share of the mass float32 [B,K,G].
    """
    flat = (peak.size,)
    each = pl.BlockSpec((None,), lambda i: (i,))
    out = _pallas.call(
        functools.partial(_threshold_kernel, top_p=top_p),
        name="top_p_threshold",
        grid=flat,
        in_specs=[pl.BlockSpec((None, counts.shape[-1]), lambda i: (i, 0)), each, each],
        out_specs=[each] * 3,
        out_shape=[jax.ShapeDtypeStruct(flat, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)],
    )(counts.reshape(*flat, -1), peak.reshape(flat), exact_lse.reshape(flat))
    return tuple(x.reshape(peak.shape) for x in out)


def list_marked(mark_kernel, inputs, quantized, length, *, tokens):
    """Tokens that the kernel marks, in a list: indices int32 [B,K,T] and counts int32 [B,K].

    Args:
      mark_kernel: `_mark_scores_kernel` or `mark_thresholds_kernel`, with its sink.
      inputs: what it reads, arrays [B,K,...].
      tokens: T.
    """
    batch, kv_heads = inputs[0].shape[:2]
    block = _block_tokens(tokens)
    grid = (batch * kv_heads, tokens // block)

    def like(*shape):
        return jax.ShapeDtypeStruct((batch, kv_heads, *shape), jnp.int32)

    def head(array):
        return _pallas.per_head(array, kv_heads)

    per_block = pl.BlockSpec((None, None, None), lambda row, i: (row // kv_heads, row % kv_heads, i))
    mask, counts = _pallas.call(
        functools.partial(mark_kernel, block=block),
        name="top_p_mark",
        grid=grid,
        in_specs=[_pallas.per_sequence(kv_heads)] * 2 + [head(x) for x in inputs],
        out_specs=[head(like(tokens // 32)), per_block],
        out_shape=[like(tokens // 32), like(tokens // block)],
    )(quantized, length, *inputs)
    return _write(mask, counts, length)


def list_mask(mask, length):
    """`rabitq_jax.token_list.list_tokens`."""
    tokens = mask.shape[-1]
    block = _block_tokens(tokens)
    listed = mask & (jnp.arange(tokens, dtype=jnp.int32) < length[:, None, None])
    bits = listed.reshape(*mask.shape[:2], -1, 32).astype(jnp.int32)
    words = jnp.sum(bits << jnp.arange(32, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
    return _write(words, jnp.sum(listed.reshape(*mask.shape[:2], -1, block), axis=-1, dtype=jnp.int32), length)


def _write(mask, counts, length):
    """The tokens of a mask, int32 [B,K,T/32], of which a block holds as many as `counts` says, int32 [B,K,N], none at
    or past length [B]: indices int32 [B,K,T], counts int32 [B,K]."""
    batch, kv_heads, words = mask.shape
    tokens = 32 * words

    def head(array):
        return _pallas.per_head(array, kv_heads)

    out_shape = [jax.ShapeDtypeStruct((batch, kv_heads, *shape), jnp.int32) for shape in ((tokens,), ())]
    return _pallas.call(
        functools.partial(_write_kernel, block=_block_tokens(tokens)),
        name="list_tokens",
        grid=(batch * kv_heads, counts.shape[-1]),
        in_specs=[_pallas.per_sequence(kv_heads), head(counts), head(mask)],
        out_specs=[head(x) for x in out_shape],
        out_shape=out_shape,
    )(length, counts, mask)
