"""Tokens counted by bins in a block's shared memory, and added to their row's state; for Hopper GPUs.

A token is counted by an integer of which the lowest 16 bits are its depth, in steps of 1/256 of a bin
(mosaic_scorers.py): it adds 4096 times these, and 1. So a bin's word counts up to 4095 tokens in its lowest 12 bits,
and has above them the sum of their depths, of which the bin is known: what is left are their places in it. A token that
is not to be counted is added to a word that nobody reads: a branch around the addition takes longer.
"""

import functools

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, HEADS, LOG2_E, PLACES, State

COUNT_BITS, LANES = 12, 32
LARGEST_COUNT = 2**COUNT_BITS - 1


class Counters:
    """In shared memory, bins [groups][bin][head of 4], largest scores [groups][head of 4], and a word for each lane."""

    def __init__(self, groups: int, shared):
        self._groups, self._shared = groups, shared

    @staticmethod
    def words(groups: int) -> int:
        """Of shared memory."""
        return HEADS * groups * (BINS + 1) + LANES

    def clear(self):
        at = m.add(self._shared, m.left(m.thread_index(), 4))
        for i in range(HEADS * self._groups * BINS // (4 * m.WARPGROUP)):
            m.store_shared(at, [m.value(0)] * 4, offset=16 * m.WARPGROUP * i)
        at = self._peak(m.thread_index())
        m.when(m.less(m.thread_index(), HEADS * self._groups), lambda: m.store_shared(at, [m.value(0)]))
        m.barrier()

    def add(self, h: int, steps, where):
        """Count a token, in its bin for the lane's head of group h, where a condition holds."""
        lane, offset = m.bit_and(m.thread_index(), LANES - 1), 4 * HEADS * BINS * h
        mine = m.add(self._shared, m.left(m.bit_and(lane, HEADS - 1), 2))
        unread = m.add(self._shared, m.left(m.add(lane, HEADS * self._groups * (BINS + 1)), 2))
        at = m.select(where, m.add(m.left(m.second_byte(steps), 4), mine), m.subtract(unread, offset))
        m.add_shared(at, m.add(m.left(steps, COUNT_BITS), 1), offset=offset)

    def flush(self, bases, largest, state: State):
        """Add to a row's state: the bins, and of each group the lane's largest score, NaN being larger than any, whose
        head's first bin begins at a base."""
        thread, lane = m.thread_index_anew(), m.bit_and(m.thread_index_anew(), LANES - 1)
        for h, (base, mine) in enumerate(zip(bases, largest, strict=True)):
            mine = m.minimum(mine, 3e38)
            peak = mine
            for lanes in (4, 8, 16):
                peak = m.maximum(peak, m.shuffle_xor(peak, lanes))
            raise_peak = functools.partial(m.max_shared, self._peak(m.add(lane, HEADS * h)), _key(peak))
            m.when(m.less(lane, HEADS), raise_peak)
            as_large = m.exp2(m.multiply_float(m.subtract_float(mine, peak), LOG2_E))
            as_large = m.select(m.less_float(base, mine), as_large, 0.0)
            for lanes in (4, 8, 16):
                as_large = m.add_float(as_large, m.shuffle_xor(as_large, lanes))
            height = m.minimum(m.multiply_float(m.subtract_float(peak, base), float(BINS_PER_NAT)), BINS - 1.0)
            count = m.to_integer(m.multiply_float(as_large, float(PLACES)))
            above = state.above(m.add(lane, HEADS * h), m.to_integer(height))
            is_above = m.both(m.less(lane, HEADS), m.less_float(base, peak))
            m.when(is_above, functools.partial(m.add_global, above, count))
        m.barrier()
        for h in range(self._groups):
            for i in range(BINS // m.WARPGROUP):
                bin_ = m.add(thread, m.WARPGROUP * i)
                four = m.load_shared(m.add(self._shared, m.left(bin_, 4)), words=4, offset=4 * HEADS * BINS * h)
                for head, word in enumerate(four):
                    count = m.bit_and(word, LARGEST_COUNT)
                    places = m.subtract(m.right(word, COUNT_BITS), m.multiply(m.multiply(count, bin_), PLACES))
                    places = m.bit_and(places, 2 ** (32 - COUNT_BITS) - 1)
                    m.add_global_pair(state.bin(m.value(HEADS * h + head), bin_), places, count)
        keep_peak = lambda: m.max_global(state.peak(thread), m.load_shared(self._peak(thread))[0])  # noqa: E731
        m.when(m.less(thread, HEADS * self._groups), keep_peak)

    def _peak(self, head):
        """Shared address of a head's largest score."""
        return m.add(m.add(self._shared, 4 * HEADS * BINS * self._groups), m.left(head, 2))


def _key(x):
    """An unsigned number in the order of the f32, above 0."""
    bits = m.as_int(x)
    return m.bit_xor(bits, m.bit_or(m.right_signed(bits, 31), 0x80000000))
