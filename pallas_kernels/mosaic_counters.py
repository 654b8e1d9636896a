"""Tokens counted by bins in a block's shared memory, and added to their row's state; for Hopper GPUs.

A token is counted by an integer of which the lowest 16 bits are its depth, in steps of 1/256 of a bin (mosaic_scorers.py):
it adds 4096 times these, and 1. So a bin's word counts up to 4095 tokens in its lowest 12 bits, and has above them the
sum of their depths, of which the bin is known: what is left are their places in it.

Two lanes of a warp whose words are in one bank of shared memory wait for each other. So few lanes share a copy of a head's
bins, which has some banks for itself: of 4 copies each is of two lanes, and has two banks.
"""

import functools

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, HEADS, LOG2_E, PLACES, State

COUNT_BITS = 12
# Of all heads' bins: as many copies as there is room for.
LARGEST_COPIES = 4


def copies_of(groups: int) -> int:
    return max(1, LARGEST_COPIES // groups)


class Counters:
    """Bins [groups][bin][copy][head of 4], and largest scores [groups][head of 4], in shared memory."""

    def __init__(self, groups: int, shared):
        self._groups, self._shared, self._copies = groups, shared, copies_of(groups)

    @staticmethod
    def words(groups: int) -> int:
        """Of shared memory."""
        return HEADS * groups * (copies_of(groups) * BINS + 1)

    def clear(self):
        for i in range(HEADS * self._groups * self._copies * BINS // (4 * m.WARPGROUP)):
            m.store_shared(m.add(self._shared, m.left(m.thread_index(), 4)), [m.value(0)] * 4, offset=16 * m.WARPGROUP * i)
        at = self._peak(m.thread_index())
        m.when(m.less(m.thread_index(), HEADS * self._groups), lambda: m.store_shared(at, [m.value(0)]))
        m.barrier()

    def add(self, h: int, steps, where):
        """Count a token, in its bin for the lane's head of group h, where a condition holds."""
        # Lane 4 g + head counts in copy g copies / 8.
        lane = m.bit_and(m.thread_index(), 31)
        copy = m.right(m.multiply(lane, self._copies), 5)
        mine = m.add(m.left(copy, 2), m.bit_and(lane, HEADS - 1))
        at = m.add(m.multiply(m.second_byte(steps), self._bin_bytes), m.add(self._shared, m.left(mine, 2)))
        m.add_shared(at, m.add(m.left(steps, COUNT_BITS), 1), offset=self._bin_bytes * BINS * h, where=where)

    @property
    def _bin_bytes(self) -> int:
        """Of a group's bin."""
        return 4 * HEADS * self._copies

    def flush(self, bases, largest, state: State):
        """Add to a row's state: the bins, and the largest scores of a lane, NaN being larger than any, one a group as where
        their first bins begin."""
        thread, lane = m.thread_index_anew(), m.bit_and(m.thread_index_anew(), 31)
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
                for head, (count, depths) in enumerate(self._add_up(h, bin_)):
                    places = m.subtract(depths, m.multiply(m.multiply(count, bin_), PLACES))
                    places = m.bit_and(places, 2 ** (32 - COUNT_BITS) - 1)
                    m.add_global_pair(state.bin(m.value(HEADS * h + head), bin_), places, count)
        keep_peak = lambda: m.max_global(state.peak(thread), m.load_shared(self._peak(thread))[0])  # noqa: E731
        m.when(m.less(thread, HEADS * self._groups), keep_peak)

    def _add_up(self, h: int, bin_):
        """Of each head of group h, a bin's count, and its sum of depths but for some high bits."""
        bins = m.add(self._shared, m.multiply(bin_, self._bin_bytes))
        sums = [(m.value(0), m.value(0))] * HEADS
        for i in range(self._copies):
            # Not all lanes begin with the same copy, which is in the same banks.
            copy = m.bit_and(m.add(m.right(m.multiply(bin_, self._copies), 3), i), self._copies - 1)
            four = m.load_shared(m.add(bins, m.left(copy, 4)), words=4, offset=self._bin_bytes * BINS * h)
            sums = [
                (m.add(count, m.bit_and(word, 2**COUNT_BITS - 1)), m.add(depths, m.right(word, COUNT_BITS)))
                for (count, depths), word in zip(sums, four, strict=True)
            ]
        return sums

    def _peak(self, head):
        """Shared address of a head's largest score."""
        return m.add(m.add(self._shared, self._bin_bytes * BINS * self._groups), m.left(head, 2))


def _key(x):
    """An unsigned number in the order of the f32, above 0."""
    bits = m.as_int(x)
    return m.bit_xor(bits, m.bit_or(m.right_signed(bits, 31), 0x80000000))
