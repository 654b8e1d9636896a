"""Sums over the tokens that query heads found themselves, among bins of scores; for Hopper GPUs.

    block     every n-th run of 128 places of a list, for 4 query heads: a part
    thread    a token at a time; all terms of its 4 heads, added to 32 sums
    warp      32 sums of 32 lanes -> one sum a lane, in 31 shuffles; then those of 4 warps, through shared memory

The terms are those of rabitq_jax/certificate.py. A token's score is taken to be the middle of its bin, and thresholds
are edges of bins. The normal distribution is 1/2 t e^(p(t) - x^2 / 2) below zero, t = 1 / (1 + |x| / sqrt(8)), with a
minimax polynomial p (relative error below 2e-5), after the form of Numerical Recipes' erfc.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, HEADS, LARGEST_DEVIATION, LOG2_E
from pallas_kernels.mosaic_certified_threshold import LIMITS, bins_of

# Sums of a query head; see `found_sums`.
KINDS = 8
WARPS, LANES = 4, 32
# Blocks that keep the device busy, and the most that a list is split into.
BLOCKS, LARGEST_PARTS = 512, 32
# Below LARGEST_DEVIATION by more than rounding.
SURE_DEVIATION = LARGEST_DEVIATION * (1 - 1e-5)
POLYNOMIAL = (-1.26632515, 1.01540853, 0.265766302, 0.451911843, -0.688236429, 0.221466357)


def parts(rows: int) -> int:
    """Parts of each of so many lists."""
    return max(1, min(BLOCKS // rows, LARGEST_PARTS))


def found_sums(
    indices, counts, logits, bins, scale, quantized, limits,
    *, sink: int, deviations: float, least_deviation: float, far: float, largest_log: float,
):  # fmt: skip
    """Sums over lists of tokens.

    Args:
      indices: int32 [B,K,T]; counts: int32 [B,K].
      logits: float32 [R,G,T], the exact logits of the listed tokens, in the lists' order; R = B K.
      bins: int32 [B,K,G,T/4], of `mosaic_score_bins.score_bins`; scale: bfloat16 [B,K,T]; quantized: int32 [B].
      limits: float32 [B,K,H,LIMITS].
      Others: as in `verified_attention.verified_attention`.

    Returns:
      float32 [R,H/4,N,32], for each 4 query heads and part of a list the sums of `verified_attention` [4,KINDS].
    """
    batch, kv_heads, heads = limits.shape[:3]
    rows, groups = batch * kv_heads, heads // HEADS
    sizes = _Sizes(
        kv_heads=kv_heads, group=bins.shape[2], groups=groups, tokens=indices.shape[-1], parts=parts(rows * groups),
        sink=sink, deviations=deviations, least_deviation=least_deviation, far=far, largest_log=largest_log,
    )  # fmt: skip
    return m.call(
        functools.partial(_kernel, sizes),
        name="found_sums",
        out_type=jax.ShapeDtypeStruct((rows, groups, sizes.parts, HEADS * KINDS), jnp.float32),
        blocks=rows * groups * sizes.parts,
        shared_words=WARPS * LANES,
    )(indices, counts, logits, bins, scale, quantized, limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    kv_heads: int
    group: int
    groups: int
    tokens: int
    parts: int
    sink: int
    deviations: float
    least_deviation: float
    far: float
    largest_log: float

    @property
    def heads(self) -> int:
        """Heads that a block looks at."""
        return min(self.group, HEADS)


def _kernel(sizes: _Sizes, indices, counts, logits, bins, scale, quantized, limits, sums, shared):
    """indices [R,T], counts [R], logits [R,G,T], bins [R,G,T/4], scale [R,T], quantized [B], limits [R,H,LIMITS]; sums
    [R,H/4,N,32]; shared memory: sums of each warp [4,32]."""
    some = m.divide(m.block_index(), sizes.parts)
    part = m.subtract(m.block_index(), m.multiply(some, sizes.parts))
    row = m.divide(some, sizes.groups)
    first_head = m.multiply(m.subtract(some, m.multiply(row, sizes.groups)), HEADS)
    quantized = m.load(m.address(quantized, m.divide(row, sizes.kv_heads)))[0]
    # From the first scored token on, in unsigned numbers: an empty range must not be less than empty.
    scored_tokens = m.subtract(m.maximum_signed(quantized, sizes.sink), sizes.sink)
    count = m.load(m.address(counts, row))[0]
    heads = [_Head(sizes, row, m.add(first_head, i), logits, bins, limits) for i in range(sizes.heads)]
    first = m.add(m.multiply(part, m.WARPGROUP), m.thread_index())

    def add_token(i, totals):
        place = m.add(first, m.multiply(i, sizes.parts * m.WARPGROUP))
        is_listed = m.less(place, count)
        place = m.minimum_signed(place, m.subtract(count, 1))
        token = m.load(m.address(indices, m.add(m.multiply(row, sizes.tokens), place)))[0]
        pair = m.load(m.address(scale, m.right(m.add(m.multiply(row, sizes.tokens), token), 1)))[0]
        low, high = m.bfloat16_pair(pair)
        of_token = m.select(m.less(m.bit_and(token, 1), 1), low, high)
        is_scored = m.less(m.subtract(token, sizes.sink), scored_tokens)
        loads = [head.load(place, token) for head in heads]
        terms = [head.terms(*load, of_token, is_listed, is_scored) for head, load in zip(heads, loads, strict=True)]
        return [m.add_float(old, new) for old, new in zip(totals, [x for four in terms for x in four], strict=True)]

    # Runs of this part, the same in all threads.
    start = m.minimum_signed(m.multiply(part, m.WARPGROUP), count)
    runs = m.divide(m.add(m.subtract(count, start), sizes.parts * m.WARPGROUP - 1), sizes.parts * m.WARPGROUP)
    totals = m.loop(runs, [m.value(0.0)] * (sizes.heads * KINDS), add_token)
    _store_sums(totals, m.shared_address(shared), sums)


class _Head:
    """A query head: addresses, and what its limits say."""

    def __init__(self, sizes: _Sizes, row, head, logits, bins, limits):
        self.sizes, self.logits, self.bins = sizes, logits, bins
        # Padded heads do what the last one does.
        real = head if sizes.group % HEADS == 0 or sizes.group < HEADS else m.minimum_signed(head, sizes.group - 1)
        place = m.add(m.multiply(row, sizes.group), real)
        self.first_logit, self.first_word = m.multiply(place, sizes.tokens), m.multiply(place, sizes.tokens // 4)
        padded = m.add(m.multiply(row, HEADS * sizes.groups), real)
        at = m.address(limits, m.multiply(padded, LIMITS))
        self.noise, self.peak, self.base, self.kept = map(m.as_float, m.load(at, words=4))
        self.depth = m.as_float(m.load(at, offset=16)[0])
        self.gain = m.multiply_float(self.noise, BINS_PER_NAT * sizes.deviations)
        self.kept_by_all = m.to_integer(self.kept)
        edge = m.fma(self.kept, -1 / BINS_PER_NAT, self.base)
        self.bulk = m.select(m.less(self.kept_by_all, BINS), edge, float("-inf"))

    def load(self, place, token):
        """A token's exact logit, and the bin of its score."""
        logit = m.as_float(m.load(m.address(self.logits, m.add(self.first_logit, place)))[0])
        word = m.load(m.address(self.bins, m.add(self.first_word, m.right(token, 2))))[0]
        return logit, m.bit_and(m.right(word, m.left(m.bit_and(token, 3), 3)), BINS - 1)

    def terms(self, logit, bin_, scale, is_listed, is_scored):
        """The token's `KINDS` terms."""
        sizes = self.sizes
        zero_unless = lambda condition, x: m.select(condition, x, 0.0)  # noqa: E731
        sd = m.maximum(m.multiply_float(self.noise, scale), sizes.least_deviation)
        variance, over_sd = m.multiply_float(sd, sd), m.reciprocal(sd)
        kept = m.maximum_signed(self.kept_by_all, m.add(bins_of(self.depth, self.gain, scale), 1))
        # What has too large a deviation to be counted is kept whatever its score, and stands for no token that was not.
        always = m.either(m.not_less(kept, BINS), m.less_float(SURE_DEVIATION, sd))
        is_found = m.both(m.both(is_listed, is_scored), m.either(always, m.less(bin_, kept)))
        # Where the best bin's scores are is not known: anywhere above its edge.
        is_placed = m.not_less(bin_, 1)
        threshold = m.fma(m.to_float(kept), -1 / BINS_PER_NAT, self.base)
        noisy = m.fma(m.add_float(m.to_float(bin_), 0.5), -1 / BINS_PER_NAT, self.base)

        weight = exp(m.minimum(m.subtract_float(logit, self.peak), sizes.largest_log))
        tau = m.multiply_float(m.subtract_float(threshold, logit), over_sd)
        tau = m.minimum(m.maximum(tau, -2 * sizes.far), 2 * sizes.far)
        minus_half_square = m.multiply_float(m.multiply_float(tau, tau), -0.5)
        tail = _tail(tau, minus_half_square)
        is_below = m.less_float(tau, 0.0)
        rest = m.subtract_float(1.0, tail)
        over_found = m.reciprocal(m.select(is_below, rest, tail))
        hazard = m.multiply_float(m.multiply_float(exp(minus_half_square), 1 / math.sqrt(2 * math.pi)), over_found)
        h0 = m.multiply_float(m.select(is_below, tail, rest), over_found)
        h1, h2 = (
            m.multiply_float(normal_cdf(m.fma(sd, -float(j), tau)), over_found) for j in (1, 2)
        )  # fmt: skip
        missed = m.multiply_float(weight, m.subtract_float(h0, h1))
        second = m.fma(exp(variance), h2, m.fma(h1, -2.0, h0))
        spread = m.multiply_float(weight, m.maximum(second, 0.0))

        is_near = m.both(m.both(is_found, m.negate(always)), m.less_float(-sizes.far, tau))
        is_sure = m.both(m.both(is_near, is_placed), m.less_float(tau, 0.5))
        minus_half_variance = m.multiply_float(variance, -0.5)
        is_below_bulk = m.both(m.both(is_found, is_placed), m.less_float(m.subtract_float(noisy, variance), self.bulk))
        returned = exp(m.subtract_float(m.add_float(noisy, minus_half_variance), self.peak))
        is_own = m.either(is_found, m.both(is_listed, m.negate(is_scored)))
        return [
            zero_unless(is_listed, weight),
            zero_unless(is_own, weight),
            zero_unless(is_near, missed),
            zero_unless(is_near, m.fma(missed, missed, m.multiply_float(weight, spread))),
            zero_unless(is_sure, m.fma(hazard, m.subtract_float(tau, hazard), 1.0)),
            zero_unless(is_sure, m.fma(m.subtract_float(noisy, logit), over_sd, m.subtract_float(0.0, hazard))),
            zero_unless(is_below_bulk, returned),
            zero_unless(is_found, 1.0),
        ]


def exp(x):
    return m.exp2(m.multiply_float(x, LOG2_E))


def normal_cdf(x):
    """Phi(x)."""
    tail = _tail(x, m.multiply_float(m.multiply_float(x, x), -0.5))
    return m.select(m.less_float(x, 0.0), tail, m.subtract_float(1.0, tail))


def _tail(x, minus_half_square):
    """Phi(-|x|)."""
    t = m.reciprocal(m.fma(m.maximum(x, m.subtract_float(0.0, x)), math.sqrt(1 / 8), 1.0))
    log2_rest = m.value(POLYNOMIAL[-1] * LOG2_E)
    for coefficient in POLYNOMIAL[-2::-1]:
        log2_rest = m.fma(log2_rest, t, coefficient * LOG2_E)
    return m.multiply_float(m.multiply_float(t, 0.5), m.exp2(m.fma(minus_half_square, LOG2_E, log2_rest)))


def _store_sums(totals, shared, sums):
    """The block's sums of the threads' totals, to its 32 words."""
    lane = m.bit_and(m.thread_index(), LANES - 1)
    values = totals + [m.value(0.0)] * (LANES - len(totals))
    for lanes in (16, 8, 4, 2, 1):
        is_upper = m.not_less(m.bit_and(lane, lanes), 1)
        # Each lane goes on with half of the sums, and gives the others to the lane that goes on with those.
        halves = list(zip(values[:lanes], values[lanes:], strict=True))
        values = [
            m.add_float(
                m.select(is_upper, high, low), m.shuffle_xor(m.select(is_upper, low, high), lanes)
            )
            for low, high in halves
        ]  # fmt: skip
    mine = m.add(shared, m.left(m.thread_index(), 2))
    m.store_shared(mine, [m.as_int(values[0])])
    m.barrier()

    def store():
        warps = [m.as_float(m.load_shared(mine, offset=4 * LANES * warp)[0]) for warp in range(WARPS)]
        at = m.address(sums, m.add(m.multiply(m.block_index(), LANES), m.thread_index()))
        m.store(at, [m.as_int(functools.reduce(m.add_float, warps))])

    m.when(m.less(m.thread_index(), LANES), store)
