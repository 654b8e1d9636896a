"""Which scored tokens of a row stand for all of them; for Hopper GPUs."""

from pallas_kernels import _mosaic as m
from pallas_kernels.prepare_query import SAMPLES


def sampled_token(i, scored, *, sink: int, tokens: int):
    """The i-th of `SAMPLES` tokens, spread evenly over so many scored ones: `prepare_query.sample_positions`."""
    each = m.divide(scored, SAMPLES)
    rest = m.subtract(scored, m.multiply(each, SAMPLES))
    place = m.add(m.multiply(each, i), m.divide(m.multiply(rest, i), SAMPLES))
    return m.minimum_signed(m.add(place, sink), tokens - 1)
