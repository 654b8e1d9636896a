"""Parts of attention outputs, one warp a query head: rescaled to the largest peak and added up; for Hopper GPUs.

warp     32 columns at a time: lane = 4 columns of one of 4 parts at a time; 8 parts of each are under way at once
"""

import functools

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_top_p_threshold import exp, warp_sum

LANE_COLUMNS, AT_ONCE = 4, 8
COLUMNS = 32
LANES = COLUMNS // LANE_COLUMNS
APART = 32 // LANES
LOWEST = -1e30


class Parts:
    """The parts of a query head: `number` of them, from place `first` on.

    peaks and totals [N,M], outs [N,M,C] float32 references; `head` is one of M.
    """

    def __init__(self, peaks, totals, outs, *, heads: int, columns: int, head, first, number, lane):
        self.peaks, self.totals, self.outs, self.heads, self.columns = peaks, totals, outs, heads, columns
        self.head, self.first, self.number, self.lane = head, first, number, lane
        self.peak, self.total = self._add_up()

    def _load(self, ref, part):
        place = m.add(self.first, part)
        return m.as_float(m.load_written(m.address(ref, m.add(m.multiply(place, self.heads), self.head)))[0])

    def _add_up(self):
        """The largest peak, and the total in units of e^peak."""

        def add(i, carried):
            peak, total = carried
            part = m.add(self.lane, m.multiply(i, 32))
            is_real = m.less(part, self.number)
            part = self._within(part)
            more = m.select(is_real, self._load(self.peaks, part), LOWEST)
            weight = m.select(is_real, self._load(self.totals, part), 0.0)
            new_peak = m.maximum(peak, more)
            total = m.multiply_float(total, exp(m.subtract_float(peak, new_peak)))
            return [new_peak, m.fma(weight, exp(m.subtract_float(more, new_peak)), total)]

        peak, total = m.loop(m.right(m.add(self.number, 31), 5), [m.value(LOWEST), m.value(0.0)], add)
        highest = warp_sum(peak, m.maximum)
        return highest, warp_sum(m.multiply_float(total, exp(m.subtract_float(peak, highest))), m.add_float)

    def _within(self, part):
        return m.maximum_signed(m.minimum_signed(part, m.subtract(self.number, 1)), 0)

    def store(self, first_column, out, word, size: int):
        """32 columns of the output, of `size` that are real, to `out` from a word of the head's first column on."""
        mine = m.add(first_column, m.multiply(m.bit_and(self.lane, LANES - 1), LANE_COLUMNS))
        first_part = m.divide(self.lane, LANES)

        def add(i, sums):
            loads = []
            for j in range(AT_ONCE):
                part = m.add(m.add(first_part, APART * j), m.multiply(i, APART * AT_ONCE))
                is_real = m.less(part, self.number)
                part = self._within(part)
                place = m.add(m.multiply(m.add(self.first, part), self.heads), self.head)
                words = m.load_written(m.address(self.outs, m.add(m.multiply(place, self.columns), mine)), words=4)
                loads.append((is_real, self._load(self.peaks, part), words))
            for is_real, peak, words in loads:
                weight = m.select(is_real, exp(m.subtract_float(peak, self.peak)), 0.0)
                # A part that is not real may hold anything.
                values = [m.select(is_real, m.as_float(w), 0.0) for w in words]
                sums = [m.fma(weight, x, total) for x, total in zip(values, sums, strict=True)]
            return sums

        rounds = m.divide(m.add(self.number, APART * AT_ONCE - 1), APART * AT_ONCE)
        sums = m.loop(rounds, [m.value(0.0)] * LANE_COLUMNS, add)
        for lanes in (LANES, 2 * LANES):
            sums = [m.add_float(x, m.shuffle_xor(x, lanes)) for x in sums]
        # An empty list has no parts, and gives zero.
        over_total = m.select(m.less_float(self.total, 1e-30), 0.0, m.reciprocal(self.total))
        is_first = m.less(self.lane, LANES)

        def store_column(i, x):
            column = m.add(mine, i)
            at = m.address(out, m.add(word, column))
            m.store(at, [m.as_int(m.multiply_float(x, over_total))], where=m.both(is_first, m.less(column, size)))

        for i, x in enumerate(sums):
            functools.partial(store_column, i, x)()
