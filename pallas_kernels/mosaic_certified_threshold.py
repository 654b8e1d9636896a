"""How many bins hold a share of the true mass, from counts of debiased logits: by one warp a query head.

    lane i     bins 8 i .. 8 i + 7 of z - sd^2 / 2, best first; sums run over lanes, then over a lane's list

The equations are those of rabitq_jax/thresholds.py, on the grid of the bins. A bin's mass is known to 0.2 %
(mosaic_top_p_threshold.py); its square is that of as many equal weights.
"""

import dataclasses
import functools

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, LOG2_E, State
from pallas_kernels.mosaic_top_p_threshold import LANE_BINS, LaneBins, bin_masses, exact_mass, warp_sum

# What is said of a head: noise; peak, the unit of masses being e^peak; base; how many bins are kept; the single
# threshold in bins below base; C1; the total mass; and the largest scale of the row. In limits of a second round, the
# typical deviation of the head's estimates takes the place of the total.
LIMITS, DEVIATION = 8, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What is promised of a head's captured mass, and constants of rabitq_jax/thresholds.py and certificate.py.

    Attributes:
      top_p: the share; certified: but for a failure rate, or on average.
      left_out: share of the mass that thresholds plan to leave out.
      deviations: confidence in standard deviations.
    """

    top_p: float
    certified: bool
    left_out: float
    deviations: float
    shared: float
    least_single: float
    least_deviation: float
    far: float
    prior_tokens: float
    largest_log: float


def find_limits(rule: Rule, lane, state: State, head, scored, base, exact_lse, noise):
    """A head's limits, `LIMITS` f32, the same in all lanes, of so many tokens scored."""
    _, counts, *_ = counted = LaneBins.load(state, head, lane).counted(lane, scored)
    lower, upper, peak = bin_masses(lane, counted, base)
    total = m.add_float(exact_mass(exact_lse, peak), warp_sum(_sum(lower), m.add_float))
    largest_scale = m.as_float(m.load(state.largest_scale())[0])
    budget = m.multiply_float(total, rule.left_out)
    kept = m.value(BINS) if rule.left_out == 0 else _kept_bins(rule, lane, upper, counts, budget, 0.0)
    below = _mass_below(lane, upper, kept)
    if rule.certified:
        depth = _single_depth(rule, m.subtract_float(budget, below), budget, peak, base)
    else:
        # Above what any deviation brings to a threshold: it adds no token.
        largest = m.minimum(m.multiply_float(largest_scale, noise), rule.deviations)
        excess = m.multiply_float(largest, m.fma(largest, -0.5, rule.deviations))
        depth = m.fma(excess, -float(BINS_PER_NAT), m.add_float(m.to_float(kept), -1.0))
    return [noise, peak, base, m.to_float(kept), depth, below, total, largest_scale]


def lower_limits(rule: Rule, lane, counted, limits, known):
    """`rabitq_jax.thresholds.extended_thresholds`: limits of a head that is short, the same in all lanes.

    Args:
      counted: of its bins, as `mosaic_top_p_threshold.LaneBins` gives them.
      known: attended, own, rest and bulk of its `rabitq_jax.certificate.Certificate`.
    """
    noise, peak, base, kept, depth, below, total, largest_scale = limits
    attended, own, rest, bulk = known
    _, counts, *_ = counted
    _, upper, _ = bin_masses(lane, counted, base)
    budget = m.multiply_float(attended, rule.left_out / rule.top_p)
    others = m.maximum(m.subtract_float(attended, own), 0.0)
    over_before = m.reciprocal(m.maximum(below, 1e-30))
    level = m.multiply_float(bulk, over_before)
    new_kept = _kept_bins(rule, lane, upper, counts, m.add_float(budget, others), level)
    new_below = _mass_below(lane, upper, new_kept)
    expected = m.multiply_float(new_below, m.maximum(m.multiply_float(rest, over_before), 1.0))
    expected = m.maximum(m.subtract_float(expected, others), 0.0)
    new_depth = _single_depth(rule, m.subtract_float(budget, expected), budget, peak, base)
    old_kept = m.to_integer(kept)
    below = m.select(m.less(old_kept, new_kept), new_below, below)
    kept = m.to_float(m.maximum_signed(old_kept, new_kept))
    return [noise, peak, base, kept, m.maximum(depth, m.minimum(new_depth, 1e6)), below, total, largest_scale]


def _kept_bins(rule: Rule, lane, upper, counts, budget, level):
    """The fewest bins under which what is left out fits the budget, by `rabitq_jax.thresholds.upper_bound`."""
    k = rule.deviations if rule.certified else 0.0
    squares = [
        m.multiply_float(m.multiply_float(mass, mass), m.reciprocal(m.maximum(m.to_float(count), 1.0)))
        for mass, count in zip(upper, counts, strict=True)
    ]

    def short(first, second):
        """1 where what lies behind a bin may not fit; 1 with NaN."""
        bound = m.fma(first, 1 + rule.shared * k, m.multiply_float(m.square_root(second), k))
        return m.select(m.not_less_float(budget, m.maximum(bound, m.multiply_float(first, level))), 0, 1)

    number = functools.reduce(m.add, map(short, _sums_behind(lane, upper), _sums_behind(lane, squares)))
    # The best bin is always kept: it holds what has no weight.
    return m.minimum_signed(m.add(warp_sum(number, m.add), 1), BINS)


def _mass_below(lane, upper, kept):
    """Mass in the bins that are not kept."""
    first_bin = m.multiply(lane, LANE_BINS)
    dropped = [m.select(m.less(m.add(first_bin, i), kept), 0.0, mass) for i, mass in enumerate(upper)]
    return warp_sum(_sum(dropped), m.add_float)


def _single_depth(rule: Rule, left, budget, peak, base):
    """The single threshold in bins below base, for what is left of a budget."""
    left = m.maximum(left, m.multiply_float(budget, rule.least_single))
    single = m.fma(m.log2(left), 1 / LOG2_E, peak)
    return m.multiply_float(m.subtract_float(base, single), float(BINS_PER_NAT))


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


def words(limits, deviations: float):
    """What a head keeps: in how many bins all tokens, in how many those of some scale, i32; and the depth, the gain and
    the curve of `bins_of`."""
    noise, _, _, kept, depth, _, _, largest_scale = limits
    kept = m.to_integer(kept)
    gain, curve = gain_and_curve(noise, deviations)
    # More bins with the deviation up to `deviations` nats, and then fewer.
    largest_scale = m.minimum(largest_scale, m.multiply_float(m.reciprocal(noise), deviations))
    most = m.maximum_signed(kept, m.add(bins_of(largest_scale, depth, gain, curve), 1))
    return [kept, most, *map(m.as_int, (depth, gain, curve))]


def gain_and_curve(noise, deviations: float):
    """Bins that a token's deviation sd = noise scale brings to the single threshold, 8 (deviations sd - sd^2 / 2), as
    gain scale + curve scale^2."""
    gain = m.multiply_float(noise, BINS_PER_NAT * deviations)
    return gain, m.multiply_float(m.multiply_float(noise, noise), -0.5 * BINS_PER_NAT)


def bins_of(scale, depth, gain, curve):
    """The last bin of z + sd^2 / 2 that a token is kept in for its deviation, i32; for a scale >= 0."""
    deepest = m.fma(m.fma(curve, scale, gain), scale, depth)
    return m.to_integer(m.maximum(m.minimum(deepest, BINS - 1.0), 0.0))
