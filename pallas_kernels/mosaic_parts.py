"""Parts of attention outputs, one warp a query head: rescaled to the largest peak and added up; for Hopper GPUs.

warp     16 or 32 columns at a time: lane = 4 columns of one of 8 or 4 parts at a time; up to 9 parts of each are
         under way at once, so that a usual number of parts takes one round
"""

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_top_p_threshold import exp, warp_sum

LANE_COLUMNS, LARGEST_COLUMNS, LARGEST_AT_ONCE = 4, 32, 9
# Parts of which the peaks are under way at once, 32 of them each.
PEAKS_AT_ONCE = 4
LOWEST = -1e30


def columns_of(usual: int) -> int:
    """Columns that are added up at a time, of so many parts as a rule."""
    return LARGEST_COLUMNS if usual <= 32 else LARGEST_COLUMNS // 2


class Parts:
    """The parts of a query head: `number` of them, from place `first` on.

    peaks and totals [N,M], outs [N,M,C] float32 references; `head` is one of M; `usual` a number of parts that takes
    little time.
    """

    def __init__(self, peaks, totals, outs, *, heads: int, columns: int, head, first, number, usual: int, lane):
        self.peaks, self.totals, self.outs, self.heads, self.columns = peaks, totals, outs, heads, columns
        self.head, self.first, self.number, self.usual, self.lane = head, first, number, usual, lane
        self.peak, self.total = self._add_up()

    def _load(self, ref, part):
        place = m.add(self.first, part)
        return m.as_float(m.load_written(m.address(ref, m.add(m.multiply(place, self.heads), self.head)))[0])

    def _add_up(self):
        """The largest peak, and the total in units of e^peak."""
        at_once = min(PEAKS_AT_ONCE, -(-self.usual // 32))

        def add(i, carried):
            peak, total = carried
            loads = []
            for j in range(at_once):
                part = m.add(self.lane, m.multiply(m.add(m.multiply(i, at_once), j), 32))
                is_real, part = m.less(part, self.number), self._within(part)
                loads.append((is_real, self._load(self.peaks, part), self._load(self.totals, part)))
            for is_real, more, weight in loads:
                more, weight = m.select(is_real, more, LOWEST), m.select(is_real, weight, 0.0)
                new_peak = m.maximum(peak, more)
                total = m.multiply_float(total, exp(m.subtract_float(peak, new_peak)))
                peak, total = new_peak, m.fma(weight, exp(m.subtract_float(more, new_peak)), total)
            return [peak, total]

        rounds = m.divide(m.add(self.number, 32 * at_once - 1), 32 * at_once)
        peak, total = m.loop(rounds, [m.value(LOWEST), m.value(0.0)], add)
        highest = warp_sum(peak, m.maximum)
        return highest, warp_sum(m.multiply_float(total, exp(m.subtract_float(peak, highest))), m.add_float)

    def _within(self, part):
        return m.maximum_signed(m.minimum_signed(part, m.subtract(self.number, 1)), 0)

    def store(self, first_column, out, word, size: int):
        """`columns_of(usual)` columns of the output, of `size` that are real, to `out` from a word of the head's first
        column on."""
        lanes = columns_of(self.usual) // LANE_COLUMNS
        apart = 32 // lanes
        at_once = min(LARGEST_AT_ONCE, -(-self.usual // apart))
        mine = m.add(first_column, m.multiply(m.bit_and(self.lane, lanes - 1), LANE_COLUMNS))
        first_part = m.divide(self.lane, lanes)

        def add(i, sums):
            loads = []
            for j in range(at_once):
                part = m.add(m.add(first_part, apart * j), m.multiply(i, apart * at_once))
                is_real, part = m.less(part, self.number), self._within(part)
                place = m.add(m.multiply(m.add(self.first, part), self.heads), self.head)
                words = m.load_written(m.address(self.outs, m.add(m.multiply(place, self.columns), mine)), words=4)
                loads.append((is_real, self._load(self.peaks, part), words))
            for is_real, peak, words in loads:
                weight = m.select(is_real, exp(m.subtract_float(peak, self.peak)), 0.0)
                # A part that is not real may hold anything.
                values = [m.select(is_real, m.as_float(w), 0.0) for w in words]
                sums = [m.fma(weight, x, total) for x, total in zip(values, sums, strict=True)]
            return sums

        rounds = m.divide(m.add(self.number, apart * at_once - 1), apart * at_once)
        sums = m.loop(rounds, [m.value(0.0)] * LANE_COLUMNS, add)
        step = lanes
        while step < 32:
            sums = [m.add_float(x, m.shuffle_xor(x, step)) for x in sums]
            step *= 2
        # An empty list has no parts, and gives zero.
        over_total = m.select(m.less_float(self.total, 1e-30), 0.0, m.reciprocal(self.total))
        is_first = m.less(self.lane, lanes)
        for i, x in enumerate(sums):
            column = m.add(mine, i)
            at = m.address(out, m.add(word, column))
            m.store(at, [m.as_int(m.multiply_float(x, over_total))], where=m.both(is_first, m.less(column, size)))
