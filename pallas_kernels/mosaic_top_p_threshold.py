"""How many bins of counted scores hold a share of the estimated mass: Top-p, by one warp a query head.

    lane i     bins 8 i .. 8 i + 7, best first; sums run over lanes, then over a lane's list

Mass is p or more. The mass of a bin's n tokens, over that of n tokens at its upper edge, lies between e^(-a w) and
(1 - a) + a e^(-w), since exp is convex: w is the bin's width in nats, and a, from 0 to 1, the tokens' mean place below
the edge. A kept bin counts with the lower bound, a dropped one with the upper; they are 0.2 % apart. Tokens above the
first bin count as `mosaic_score_bins` has bounded them from below.
"""

import dataclasses
import functools
import math
from typing import Any

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, LOG2_E, PLACES, State

LANE_BINS = BINS // 32
# Relative error that places, rounded to 1/512 of a bin, and float32 sums can make.
SLACK = 1e-3


def threshold(top_p: float, lane, counted, base, exact_lse):
    """How many bins, best first, surely hold the share: kept bins i32, tokens in them i32, estimated mass f32."""
    lower, upper, highest = bin_masses(lane, counted, base)
    _, counts, *_ = counted
    first_bin = m.multiply(lane, LANE_BINS)
    exact = exact_mass(exact_lse, highest)
    kept_lower, kept_upper = running_sums(lane, lower), running_sums(lane, upper)
    all_upper = m.shuffle(kept_upper[-1], 31)

    def short(kept_lower, kept_upper):
        """1 where the bins so far may not hold the share; 1 with NaN."""
        dropped = m.maximum(m.subtract_float(all_upper, kept_upper), 0.0)
        held = m.multiply_float(m.add_float(exact, kept_lower), 1 - top_p)
        return m.select(m.not_less_float(held, m.multiply_float(dropped, top_p * (1 + SLACK))), 0, 1)

    if top_p == 1:
        kept = m.value(BINS)
    else:
        number = functools.reduce(m.add, map(short, kept_lower, kept_upper))
        number = m.minimum_signed(m.add(warp_sum(number, m.add), 1), BINS)
        kept = m.select(m.less(short(m.value(0.0), m.value(0.0)), 1), 0, number)
    middle = [m.multiply_float(m.add_float(a, b), 0.5) for a, b in zip(upper, lower, strict=True)]
    is_kept = [m.less(m.add(first_bin, i), kept) for i in range(LANE_BINS)]
    dropped = [m.select(k, 0.0, x) for k, x in zip(is_kept, middle, strict=True)]
    tokens = [m.select(k, count, 0) for k, count in zip(is_kept, counts, strict=True)]
    total, dropped = (warp_sum(functools.reduce(m.add_float, x), m.add_float) for x in (middle, dropped))
    total = m.add_float(exact, total)
    share = m.subtract_float(
        1.0, m.multiply_float(dropped, m.reciprocal(m.select(m.less_float(0.0, total), total, 1.0)))
    )
    return kept, warp_sum(functools.reduce(m.add, tokens), m.add), share


def bin_masses(lane, counted, base):
    """Masses of a lane's bins, at least and at most, in units of e^highest; and highest, the largest score or base.

    Bin i holds scores from i to i + 1 bins' width below base; bin 0 also those above, the largest being peak; the last
    one also those below.
    """
    places, counts, above, peak = counted
    highest = m.maximum(base, peak)
    first_bin = m.multiply(lane, LANE_BINS)
    largest = exp(m.subtract_float(peak, highest))
    lane_depth = m.multiply_float(m.to_float(first_bin), 1 / BINS_PER_NAT)
    top = m.subtract_float(base, highest)
    # The upper edges of this lane's first bin, and of its first one above base.
    edge, edge_above = exp(m.subtract_float(top, lane_depth)), exp(m.add_float(top, lane_depth))
    surely_above = mass_above(above, edge_above)
    is_first = m.less(lane, 1)
    upper, lower = [], []
    for i, (place, count) in enumerate(zip(places, counts, strict=True)):
        number = m.to_float(count)
        at_edge = m.multiply_float(number, m.multiply_float(edge, nats(-i)))
        mean = m.multiply_float(
            m.to_float(place), m.reciprocal(m.maximum(m.multiply_float(number, float(PLACES)), 1.0))
        )
        low = m.multiply_float(at_edge, least_exp(m.multiply_float(mean, 1 / BINS_PER_NAT)))
        high = m.multiply_float(at_edge, m.fma(mean, nats(-1) - 1, 1.0))
        if i == 0:
            # The largest score is known, and lies in bin 0 if anything does; the others may be anywhere above its edge.
            below = m.multiply_float(edge, nats(-1))
            others = m.maximum(m.fma(m.subtract_float(number, 1.0), below, largest), surely_above)
            low = m.select(is_first, m.select(m.less(count, 1), 0.0, others), low)
            high = m.select(is_first, number, high)
        if i == LANE_BINS - 1:
            is_last = m.less(30, lane)
            low, high = m.select(is_last, 0.0, low), m.select(is_last, at_edge, high)
        upper.append(high)
        lower.append(low)
    return lower, upper, highest


def exact_mass(exact_lse, highest):
    """Of the exact tokens, in units of e^highest."""
    # Far above the highest score it needs no more precision than this.
    return exp(m.minimum(m.subtract_float(exact_lse, highest), 60.0))


@dataclasses.dataclass(frozen=True)
class LaneBins:
    """Of a head's state, the words of a lane's bins, of its bins above base, and of the largest score."""

    words: list
    words_above: list
    peak_key: Any

    @classmethod
    def load(cls, state: State, head, lane, *, now: bool = False) -> "LaneBins":
        first_bin = m.multiply(lane, LANE_BINS)
        at, above = state.bin(head, first_bin), state.above(head, first_bin)
        return cls(
            words=[w for i in range(0, 8 * LANE_BINS, 16) for w in m.load(at, words=4, offset=i, now=now)],
            words_above=[w for i in range(0, 4 * LANE_BINS, 16) for w in m.load(above, words=4, offset=i, now=now)],
            peak_key=m.load(state.peak(head), now=now)[0],
        )

    def counted(self, lane, scored):
        """Sums of places, counts, of so many tokens scored, what bins above base hold, and the largest score."""
        places, counts = self.words[::2], self.words[1::2]
        rest = m.subtract(scored, warp_sum(functools.reduce(m.add, counts), m.add))
        counts[-1] = m.select(m.less(30, lane), rest, counts[-1])
        return places, counts, self.words_above, from_key(self.peak_key)


def mass_above(above, edge):
    """Least mass of the tokens counted above base, a lane's first such bin beginning at `edge`."""
    counted = functools.reduce(m.add_float, [m.multiply_float(m.to_float(n), nats(i)) for i, n in enumerate(above)])
    return warp_sum(m.multiply_float(counted, m.multiply_float(edge, 1 / PLACES)), m.add_float)


def nats(bins: int) -> float:
    """The factor between the masses of scores so many bins apart."""
    return math.exp(bins / BINS_PER_NAT)


def exp(x):
    return m.exp2(m.multiply_float(x, LOG2_E))


def least_exp(x):
    """Just below e^-x, for x from 0 to 1/8: a series that alternates, up to a term that it subtracts."""
    return m.fma(x, m.fma(x, m.fma(x, -1 / 6, 0.5), -1.0), 1.0)


def running_sums(lane, values):
    """Sums over all values up to each, in the order of lanes, then of a lane's list."""
    sums = [values[0]]
    for x in values[1:]:
        sums.append(m.add_float(sums[-1], x))
    through = sums[-1]
    for lanes in (1, 2, 4, 8, 16):
        through = m.select(m.less(lane, lanes), through, m.add_float(through, m.shuffle_up(through, lanes)))
    before = m.select(m.less(lane, 1), 0.0, m.shuffle_up(through, 1))
    return [m.add_float(before, x) for x in sums]


def warp_sum(x, add):
    for lanes in (1, 2, 4, 8, 16):
        x = add(x, m.shuffle_xor(x, lanes))
    return x


def from_key(key):
    """The f32 of an unsigned number of the same order, minus infinity for 0; see `mosaic_counters`."""
    bits = m.select(m.less(key, 0x80000000), m.bit_xor(key, 0xFFFFFFFF), m.bit_and(key, 0x7FFFFFFF))
    return m.select(m.less(key, 1), float("-inf"), m.as_float(bits))
