"""Sums over the tokens that query heads found themselves, among bins of scores; for Hopper GPUs.

    block     every n-th run of 32 places of a list: a part
    warp      one of 4 query heads; a token a lane at a time, its terms added to 8 sums
              8 sums of 32 lanes -> one sum a group of 4 lanes, in 9 shuffles

The terms are those of rabitq_jax/certificate.py. Bins are of z + sd^2 / 2, which is taken to be the middle of its bin;
thresholds are edges of bins. The normal distribution is 1/2 t e^(p(t) - x^2 / 2) below zero, t = 1 / (1 + |x| /
sqrt(8)), with a minimax polynomial p (relative error below 2e-5), after the form of Numerical Recipes' erfc.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, HEADS, LOG2_E, word_of
from pallas_kernels.mosaic_certified_threshold import LIMITS, bins_of, gain_and_curve

# Sums of a query head; see `found_sums`.
KINDS = 8
LANES = 32
# Blocks that keep the device busy, and the most that a list is split into.
BLOCKS, LARGEST_PARTS = 1024, 64
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
      bins: int32 [B,K,T/8,G,2], of `mosaic_score_bins.score_bins`; scale: bfloat16 [B,K,T]; quantized: int32 [B].
      limits: float32 [B,K,H,LIMITS].
      Others: as in `verified_attention.verified_attention`.

    Returns:
      float32 [R,H/4,N,32], for each 4 query heads and part of a list the sums of `verified_attention` [4,KINDS].
    """
    batch, kv_heads, heads = limits.shape[:3]
    rows, groups = batch * kv_heads, heads // HEADS
    sizes = _Sizes(
        kv_heads=kv_heads, group=bins.shape[3], groups=groups, tokens=indices.shape[-1], parts=parts(rows * groups),
        sink=sink, deviations=deviations, least_deviation=least_deviation, far=far, largest_log=largest_log,
    )  # fmt: skip
    return m.call(
        functools.partial(_kernel, sizes),
        name="found_sums",
        out_type=jax.ShapeDtypeStruct((rows, groups, sizes.parts, HEADS * KINDS), jnp.float32),
        blocks=rows * groups * sizes.parts,
        shared_words=4,
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


def _kernel(sizes: _Sizes, indices, counts, logits, bins, scale, quantized, limits, sums, _):
    """indices [R,T], counts [R], logits [R,G,T], bins [R,T/8,G,2], scale [R,T], quantized [B], limits [R,H,LIMITS];
    sums [R,H/4,N,32]."""
    some = m.divide(m.block_index(), sizes.parts)
    part = m.subtract(m.block_index(), m.multiply(some, sizes.parts))
    row = m.divide(some, sizes.groups)
    warp, lane = m.right(m.thread_index(), 5), m.bit_and(m.thread_index(), LANES - 1)
    head = m.add(m.multiply(m.subtract(some, m.multiply(row, sizes.groups)), HEADS), warp)
    first_token = m.multiply(row, sizes.tokens)
    # The lane's places in the list begin here.
    first = m.add(m.multiply(part, LANES), lane)
    stride = sizes.parts * LANES

    def run():
        stop = m.load(m.address(quantized, m.divide(row, sizes.kv_heads)))[0]
        # From the first scored token on, in unsigned numbers: an empty range must not be less than empty.
        scored_tokens = m.subtract(m.maximum_signed(stop, sizes.sink), sizes.sink)
        count = m.load(m.address(counts, row))[0]
        found = _Found(sizes, row, head, logits, bins, limits)

        def load_token(place):
            token = m.load(m.address(indices, m.add(first_token, within(place))))[0]
            # Of an empty list, any token.
            return m.maximum_signed(m.minimum_signed(token, sizes.tokens - 1), 0)

        def within(place):
            return m.maximum_signed(m.minimum_signed(place, m.subtract(count, 1)), 0)

        def load_words(place, token):
            """The word with the token's scale, and what the head has of it."""
            return [
                *m.load(m.address(scale, m.right(m.add(first_token, token), 1))),
                *found.load(within(place), token),
            ]

        def add_token(i, carried):
            """The next one's words, and the number of the one after it, are under way meanwhile."""
            place = m.add(first, m.multiply(i, stride))
            next_place = m.add(place, stride)
            token, following, pair, logit, word, *totals = carried
            under_way = [following, load_token(m.add(next_place, stride)), *load_words(next_place, following)]
            low, high = m.bfloat16_pair(pair)
            of_token = m.select(m.less(m.bit_and(token, 1), 1), low, high)
            is_scored = m.less(m.subtract(token, sizes.sink), scored_tokens)
            terms = found.terms(token, logit, word, of_token, m.less(place, count), is_scored)
            return under_way + [m.add_float(*pair) for pair in zip(totals, terms, strict=True)]

        # Of this part, the same in all threads.
        start = m.minimum_signed(m.multiply(part, LANES), count)
        runs = m.divide(m.add(m.subtract(count, start), stride - 1), stride)
        token = load_token(first)
        carried = [token, load_token(m.add(first, stride)), *load_words(first, token)]
        totals = m.loop(runs, carried + [m.value(0.0)] * KINDS, add_token)[-KINDS:]
        at = m.add(m.multiply(m.block_index(), HEADS), warp)
        _store_sums(lane, totals, sums, m.multiply(at, KINDS))

    m.when(m.less(head, sizes.group), run)


class _Found:
    """Tokens that a query head found: where they are, and what its limits say."""

    def __init__(self, sizes: _Sizes, row, head, logits, bins, limits):
        self.sizes, self.logits, self.bins = sizes, logits, bins
        self.row, self.head = row, head
        self.first_logit = m.multiply(m.add(m.multiply(row, sizes.group), head), sizes.tokens)
        padded = m.add(m.multiply(row, HEADS * sizes.groups), head)
        at = m.address(limits, m.multiply(padded, LIMITS))
        self.noise, self.peak, self.base, self.kept = map(m.as_float, m.load(at, words=4))
        self.depth = m.as_float(m.load(at, offset=16)[0])
        self.margin = self.depth, *gain_and_curve(self.noise, sizes.deviations)
        self.kept_by_all = m.to_integer(self.kept)
        edge = m.fma(self.kept, -1 / BINS_PER_NAT, self.base)
        self.bulk = m.select(m.less(self.kept_by_all, BINS), edge, float("-inf"))

    def load(self, place, token):
        """The words of a token's exact logit, and of the bin of its score."""
        word = word_of(self.row, token, self.head, self.sizes.group, self.sizes.tokens)
        return m.load(m.address(self.logits, m.add(self.first_logit, place))) + m.load(m.address(self.bins, word))

    def terms(self, token, logit, word, scale, is_listed, is_scored):
        """The token's `KINDS` terms."""
        sizes, logit = self.sizes, m.as_float(logit)
        bin_ = m.bit_and(m.right(word, m.left(m.bit_and(token, 3), 3)), BINS - 1)
        zero_unless = lambda condition, x: m.select(condition, x, 0.0)  # noqa: E731
        sd = m.maximum(m.multiply_float(self.noise, scale), sizes.least_deviation)
        variance, over_sd = m.multiply_float(sd, sd), m.reciprocal(sd)
        half_variance = m.multiply_float(variance, 0.5)
        kept = m.maximum_signed(self.kept_by_all, m.add(bins_of(scale, *self.margin), 1))
        # What is kept whatever its score stands for no token that was not.
        always = m.not_less(kept, BINS)
        is_found = m.both(m.both(is_listed, is_scored), m.either(always, m.less(bin_, kept)))
        # Where the best bin's scores are is not known: anywhere above its edge.
        is_placed = m.not_less(bin_, 1)
        base = m.subtract_float(self.base, half_variance)
        threshold = m.fma(m.to_float(kept), -1 / BINS_PER_NAT, base)
        noisy = m.fma(m.add_float(m.to_float(bin_), 0.5), -1 / BINS_PER_NAT, base)
        debiased = m.subtract_float(noisy, half_variance)

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
        h1 = m.multiply_float(normal_cdf(m.subtract_float(tau, sd)), over_found)
        tilted_h2 = m.multiply_float(tilted_normal_cdf(m.fma(sd, -2.0, tau), variance), over_found)
        missed = m.multiply_float(weight, m.subtract_float(h0, h1))
        second = m.add_float(tilted_h2, m.fma(h1, -2.0, h0))
        spread = m.multiply_float(weight, m.maximum(second, 0.0))

        is_near = m.both(m.both(is_found, m.negate(always)), m.less_float(-sizes.far, tau))
        is_sure = m.both(m.both(is_near, is_placed), m.less_float(tau, 0.5))
        is_below_bulk = m.both(m.both(is_found, is_placed), m.less_float(debiased, self.bulk))
        returned = exp(m.subtract_float(debiased, self.peak))
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


def tilted_normal_cdf(x, exponent):
    """e^exponent Phi(x), also where one factor is out of range and the product is not."""
    tail = _tail(x, m.fma(m.multiply_float(x, x), -0.5, exponent))
    return m.select(m.less_float(x, 0.0), tail, m.subtract_float(exp(exponent), tail))


def _tail(x, log_factor):
    """e^(x^2 / 2 + log_factor) Phi(-|x|)."""
    t = m.reciprocal(m.fma(m.maximum(x, m.subtract_float(0.0, x)), math.sqrt(1 / 8), 1.0))
    log2_rest = m.value(POLYNOMIAL[-1] * LOG2_E)
    for coefficient in POLYNOMIAL[-2::-1]:
        log2_rest = m.fma(log2_rest, t, coefficient * LOG2_E)
    return m.multiply_float(m.multiply_float(t, 0.5), m.exp2(m.fma(log_factor, LOG2_E, log2_rest)))


def _store_sums(lane, values, sums, word):
    """The warp's sums of its lanes' values, from a word of `sums` on."""
    for lanes in (16, 8, 4):
        is_upper = m.not_less(m.bit_and(lane, lanes), 1)
        half = len(values) // 2
        # Each lane goes on with half of the sums, and gives the others to the lane that goes on with those.
        values = [
            m.add_float(m.select(is_upper, high, low), m.shuffle_xor(m.select(is_upper, low, high), lanes))
            for low, high in zip(values[:half], values[half:], strict=True)
        ]
    (value,) = values
    for lanes in (2, 1):
        value = m.add_float(value, m.shuffle_xor(value, lanes))
    at = m.address(sums, m.add(word, m.right(lane, 2)))
    m.store(at, [m.as_int(value)], where=m.less(m.bit_and(lane, 3), 1))
