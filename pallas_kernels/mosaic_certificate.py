"""What follows from a query head's sums over found tokens, by one warp: its certificate; for Hopper GPUs.

The equations are those of rabitq_jax/certificate.py.
"""

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS_PER_NAT
from pallas_kernels.mosaic_certified_threshold import DEVIATION, Rule, lower_limits
from pallas_kernels.mosaic_parts import SumOfParts
from pallas_kernels.mosaic_samples import sampled_token
from pallas_kernels.mosaic_top_p_threshold import LaneBins, exp, warp_sum
from pallas_kernels.prepare_query import SAMPLES

# Numbers of a head: the fields of a certificate, its own tokens, and how many its kv head attends.
SUMMARY = 8


def certify(rule: Rule, sums, limits, scored, mean_deviation):
    """Attended, own, rest, bulk, verified and bound, f32, of sums [KINDS] (`mosaic_found`) and tokens scored."""
    attended, own, missed, variance, information, score, returned, number = sums
    _, peak, base, _, depth, below, *_ = limits
    rest = m.add_float(m.maximum(m.subtract_float(below, returned), 0.0), missed)
    shift = m.multiply_float(score, m.reciprocal(m.add_float(information, rule.prior_tokens)))
    lowered = m.maximum(m.subtract_float(0.0, m.multiply_float(shift, mean_deviation)), 0.0)
    in_common = m.multiply_float(m.multiply_float(rest, exp(lowered)), 1 + rule.shared * rule.deviations)
    bulk = m.fma(m.square_root(variance), rule.deviations, in_common)
    largest = exp(m.minimum(m.subtract_float(m.fma(depth, -1 / BINS_PER_NAT, base), peak), rule.largest_log))
    upper = m.maximum(bulk, m.add_float(rest, largest))
    is_complete = m.not_less_float(number, m.to_float(scored))
    outside = m.maximum(m.subtract_float(rest, m.maximum(m.subtract_float(attended, own), 0.0)), 0.0)
    verified = m.multiply_float(attended, m.reciprocal(m.add_float(attended, outside)))
    bound = m.multiply_float(attended, m.reciprocal(m.add_float(own, upper)))
    # What is no number stays it.
    bound = m.select(m.not_less_float(bound, 1.0), 1.0, bound)
    return [attended, own, rest, bulk, *(m.select(is_complete, 1.0, x) for x in (verified, bound))]


def certificate_of_parts(rule: Rule, of_parts: SumOfParts, limits, scored, deviation):
    """What `certify` says of the sums of a head's parts; and how many tokens the head found."""
    found = of_parts.result()
    return certify(rule, found, limits, scored, deviation), found[-1]


def load_sample(lane, scale, first_token, scored, *, sink: int, tokens: int):
    """Words of scales of `SAMPLES` tokens spread evenly over the scored ones of a row, and the tokens: 4 a lane."""
    loads = []
    for first in range(0, SAMPLES, 32):
        token = m.add(first_token, sampled_token(m.add(lane, first), scored, sink=sink, tokens=tokens))
        loads.append((m.load(m.address(scale, m.right(token, 1)), now=True)[0], token))
    return loads


def typical_deviation(rule: Rule, sample, noise):
    """Root of the mean sd^2 of a sample."""
    total = m.value(0.0)
    for word, token in sample:
        value = scale_of(word, token)
        total = m.fma(value, value, total)
    mean_square = m.multiply_float(warp_sum(total, m.add_float), 1 / SAMPLES)
    return m.maximum(m.multiply_float(noise, m.square_root(mean_square)), rule.least_deviation)


def scale_of(pair, token):
    """The scale of a token, of the word that holds it."""
    low, high = m.bfloat16_pair(pair)
    return m.select(m.less(m.bit_and(token, 1), 1), low, high)


def store_numbers(numbers, ref, place):
    """Eight f32 to a place of an array of eights."""
    at = m.address(ref, m.multiply(place, len(numbers)))
    for i in range(0, len(numbers), 4):
        m.store(at, [m.as_int(x) for x in numbers[i : i + 4]], offset=4 * i)


def limits_of_second_round(rule: Rule, lane, bins: LaneBins | None, scored, limits, certificate, deviation):
    """Lower limits where the bound is below p, as they were elsewhere; and whether it is, 1 or 0. `bins` are those of
    the head, None of a rule by which no head is short."""
    attended, own, rest, bulk, _, bound = certificate
    is_short = m.less_float(bound, rule.top_p)
    if bins is not None:
        known = attended, own, rest, bulk
        lower = lambda limits: lower_limits(rule, lane, bins.counted(lane, scored), limits, known)  # noqa: E731
        limits = m.update(is_short, limits, lower)
    limits = [*limits[:DEVIATION], deviation, *limits[DEVIATION + 1 :]]
    return limits, m.value(0) if bins is None else m.select(is_short, 1, 0)
