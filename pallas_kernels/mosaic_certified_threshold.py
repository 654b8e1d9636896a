"""How many bins hold a share of the true mass, from weights of scores with noise: by one warp a query head.

    lane i     bins 8 i .. 8 i + 7 of z - sd^2, best first; sums run over lanes, then over a lane's list

The equations are those of rabitq_jax/thresholds.py, on the grid of the bins. C1 below a threshold, the sum of weights
in the bins that are not kept, is exact but for what the last digits of a weight are. C2, the sum of squares, is taken
to be that of weights of the row's mean spread: it decides how often a head is verified to be short, and not whether the
certificate holds, which is made of what exact attention finds.
"""

import dataclasses
import functools

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, LOG2_E, MASS_UNIT, State
from pallas_kernels.mosaic_top_p_threshold import (
    LANE_BINS,
    exp,
    from_key,
    load_bins,
    mass_above,
    nats,
    warp_sum,
)

# What is said of a head: noise; peak, the unit of masses being e^peak; base; how many bins are kept; the single
# threshold in bins below base; C1; the total mass; and the mean of e^(sd^2 / 2).
LIMITS = 8
# Mean square of e^(sd^2 / 2) over the square of its mean: for deviations of 1.5 nats that differ by a fifth.
SPREAD = 1.25
NEVER = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What a head is to keep: constants of `rabitq_jax.thresholds`, and the share of the mass to be left out."""

    left_out: float
    deviations: float
    certified: bool
    shared: float
    least_single: float


def find_limits(rule: Rule, lane, state: State, head, base, exact_lse, noise, scored):
    """A head's limits, `LIMITS` f32, the same in all lanes."""
    words, above = load_bins(state, head, lane)
    row_peak = from_key(m.load(state.peak(head))[0])
    peak = m.maximum(base, row_peak)
    top = m.subtract_float(base, peak)
    lane_depth = m.multiply_float(m.to_float(m.multiply(lane, LANE_BINS)), 1 / BINS_PER_NAT)
    edge, edge_above = exp(m.subtract_float(top, lane_depth)), exp(m.add_float(top, lane_depth))
    exact = exp(m.minimum(m.subtract_float(exact_lse, peak), 60.0))
    # Over the weight at the bin's upper edge of a token without noise.
    spreads = [
        m.multiply_float(m.fma(m.to_float(high), 2.0**32, m.to_float(low)), MASS_UNIT)
        for low, high in zip(words[::2], words[1::2], strict=True)
    ]
    number = m.maximum(m.to_float(scored), 1.0)
    mean_spread = m.multiply_float(warp_sum(_sum(spreads), m.add_float), m.reciprocal(number))
    at_edge = [m.multiply_float(edge, nats(-i)) for i in range(LANE_BINS)]
    masses = [m.multiply_float(x, y) for x, y in zip(spreads, at_edge, strict=True)]
    squares = [m.multiply_float(x, m.multiply_float(y, mean_spread)) for x, y in zip(masses, at_edge, strict=True)]
    # Tokens above base are worth more than its edge.
    surely_above = m.maximum(exp(m.subtract_float(row_peak, peak)), mass_above(above, edge_above))
    masses[0] = m.select(m.less(lane, 1), m.maximum(masses[0], surely_above), masses[0])

    masses_behind, squares_behind = _sums_behind(lane, masses), _sums_behind(lane, squares)
    total = m.add_float(exact, m.shuffle(m.add_float(masses[0], masses_behind[0]), 0))
    budget = m.multiply_float(total, rule.left_out)
    k = rule.deviations if rule.certified else 0.0

    def short(first, second):
        """1 where what lies behind a bin may not fit the budget; 1 with NaN."""
        bound = m.fma(first, 1 + rule.shared * k, m.multiply_float(m.square_root(m.multiply_float(second, SPREAD)), k))
        return m.select(m.not_less_float(budget, bound), 0, 1)

    if rule.left_out == 0:
        kept = m.value(BINS)
    else:
        number = functools.reduce(m.add, map(short, masses_behind, squares_behind))
        # The best bin is always kept: it holds what has no weight.
        kept = m.minimum_signed(m.add(warp_sum(number, m.add), 1), BINS)
    first_bin = m.multiply(lane, LANE_BINS)
    dropped = [m.select(m.less(m.add(first_bin, i), kept), 0.0, mass) for i, mass in enumerate(masses)]
    below = warp_sum(_sum(dropped), m.add_float)

    if rule.certified:
        left = m.maximum(m.subtract_float(budget, below), m.multiply_float(budget, rule.least_single))
        single = m.fma(m.log2(left), 1 / LOG2_E, peak)
        depth = m.multiply_float(m.subtract_float(base, single), float(BINS_PER_NAT))
    else:
        # Above what any deviation brings to a threshold: it adds no token.
        largest = m.multiply_float(m.as_float(m.load(state.largest_scale())[0]), noise)
        depth = m.fma(largest, -rule.deviations * BINS_PER_NAT, m.add_float(m.to_float(kept), -1.0))
    return [noise, peak, base, m.to_float(kept), depth, below, total, mean_spread]


def _sums_behind(lane, values):
    """Sums over all values behind each, in the order of lanes, then of a lane's list: those at the end may be tiny."""
    sums = [m.value(0.0)]
    for x in values[:0:-1]:
        sums.append(m.add_float(sums[-1], x))
    from_here = m.add_float(sums[-1], values[0])
    for lanes in (1, 2, 4, 8, 16):
        more = m.select(m.less(lane, 32 - lanes), m.shuffle_down(from_here, lanes), 0.0)
        from_here = m.add_float(from_here, more)
    behind = m.select(m.less(lane, 31), m.shuffle_down(from_here, 1), 0.0)
    return [m.add_float(behind, x) for x in sums[::-1]]


def _sum(values):
    return functools.reduce(m.add_float, values)


def words(limits, deviations: float, largest_scale):
    """What a head keeps: bins for all tokens, i32; and the depth and its gain with a token's scale, as `bins_of` takes
    them. The depth is `NEVER` where no scale up to the largest, if it is known, keeps a token in more bins."""
    noise, _, _, kept, depth, *_ = limits
    kept, gain = m.to_integer(kept), m.multiply_float(noise, BINS_PER_NAT * deviations)
    if largest_scale is not None:
        depth = m.select(m.less(bins_of(depth, gain, largest_scale), kept), NEVER, depth)
    return [kept, m.as_int(depth), m.as_int(gain)]


def bins_of(depth, gain, scale):
    """The last bin that a token is kept in for its deviation, i32; for a scale >= 0."""
    return m.to_integer(m.maximum(m.minimum(m.fma(gain, scale, depth), BINS - 1.0), 0.0))
