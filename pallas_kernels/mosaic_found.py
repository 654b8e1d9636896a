"""What the tokens that a query head found itself, among bins of scores, say of those it did not; for Hopper GPUs.

    lane     a token at a time, its terms added to 8 sums
    quad     8 sums of 4 lanes -> 2 sums each, in 6 shuffles

The terms are those of rabitq_jax/certificate.py. Bins are of z + sd^2 / 2, which is taken to be the middle of its bin;
thresholds are edges of bins. The normal distribution is 1/2 t e^(p(t) - x^2 / 2) below zero, t = 1 / (1 + |x| /
sqrt(8)), with a minimax polynomial p (relative error below 2e-5), after the form of Numerical Recipes' erfc.
"""

import math

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, LOG2_E
from pallas_kernels.mosaic_certified_threshold import Rule, bins_of, gain_and_curve
from pallas_kernels.mosaic_top_p_threshold import exp

# Sums of a query head: the mass of the listed tokens, that of its own, and missed, variance, information, score,
# returned and number of `rabitq_jax.certificate.Found`.
KINDS = 8
POLYNOMIAL = (-1.26632515, 1.01540853, 0.265766302, 0.451911843, -0.688236429, 0.221466357)


class Found:
    """A query head's limits [LIMITS], and what they make of tokens."""

    def __init__(self, rule: Rule, limits):
        self.rule = rule
        self.noise, self.peak, self.base, kept, depth, *_ = limits
        self.kept_by_all = m.to_integer(kept)
        self.margin = depth, *gain_and_curve(self.noise, rule.deviations)
        edge = m.fma(kept, -1 / BINS_PER_NAT, self.base)
        self.bulk = m.select(m.less(self.kept_by_all, BINS), edge, float("-inf"))

    def kept(self, scale):
        """In how many bins a token of this scale is kept."""
        return m.maximum_signed(self.kept_by_all, m.add(bins_of(scale, *self.margin), 1))

    def weight(self, logit):
        """Mass of a token, of its exact logit."""
        return exp(m.minimum(m.subtract_float(logit, self.peak), self.rule.largest_log))

    def terms(self, logit, bin_, scale, is_found):
        """Terms of a token that was found: all but the first two of `KINDS`, 0 elsewhere."""
        rule = self.rule
        zero_unless = lambda condition, x: m.select(condition, x, 0.0)  # noqa: E731
        sd = m.maximum(m.multiply_float(self.noise, scale), rule.least_deviation)
        variance, over_sd = m.multiply_float(sd, sd), m.reciprocal(sd)
        half_variance = m.multiply_float(variance, 0.5)
        kept = self.kept(scale)
        # Where the best bin's scores are is not known: anywhere above its edge.
        is_placed = m.both(is_found, m.not_less(bin_, 1))
        base = m.subtract_float(self.base, half_variance)
        threshold = m.fma(m.to_float(kept), -1 / BINS_PER_NAT, base)
        noisy = m.fma(m.add_float(m.to_float(bin_), 0.5), -1 / BINS_PER_NAT, base)
        debiased = m.subtract_float(noisy, half_variance)

        weight = self.weight(logit)
        tau = m.multiply_float(m.subtract_float(threshold, logit), over_sd)
        tau = m.minimum(m.maximum(tau, -2 * rule.far), 2 * rule.far)
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

        # What is kept whatever its score stands for no token that was not.
        is_near = m.both(m.both(is_found, m.less(kept, BINS)), m.less_float(-rule.far, tau))
        is_sure = m.both(m.both(is_near, is_placed), m.less_float(tau, 0.5))
        is_below_bulk = m.both(is_placed, m.less_float(debiased, self.bulk))
        return [
            zero_unless(is_near, missed),
            zero_unless(is_near, m.fma(missed, missed, m.multiply_float(weight, spread))),
            zero_unless(is_sure, m.fma(hazard, m.subtract_float(tau, hazard), 1.0)),
            zero_unless(is_sure, m.fma(m.subtract_float(noisy, logit), over_sd, m.subtract_float(0.0, hazard))),
            zero_unless(is_below_bulk, exp(m.subtract_float(debiased, self.peak))),
            zero_unless(is_found, 1.0),
        ]

    def masses(self, logit, is_listed, is_own):
        """The first two of `KINDS`."""
        weight = self.weight(logit)
        return [m.select(is_listed, weight, 0.0), m.select(is_own, weight, 0.0)]


def byte_of(word, token):
    """A token's bin, of the word that holds it."""
    return m.bit_and(m.right(word, m.left(m.bit_and(token, 3), 3)), BINS - 1)


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


def sums_of_quads(t, values, *, halves: bool):
    """The sums of `KINDS` values over lanes 4 g + t of each g, and if asked for over both halves of the warp: in lane t
    those of values 2 t and 2 t + 1."""
    for lanes in (2, 1):
        is_upper = m.not_less(m.bit_and(t, lanes), 1)
        half = len(values) // 2
        # Each lane goes on with half of the sums, and gives the others to the lane that goes on with those.
        values = [
            m.add_float(m.select(is_upper, high, low), m.shuffle_xor(m.select(is_upper, low, high), lanes))
            for low, high in zip(values[:half], values[half:], strict=True)
        ]
    return [m.add_float(x, m.shuffle_xor(x, 16)) for x in values] if halves else values
