"""Parts of attention added up, one warp a query head: outputs, rescaled to the largest peak, and sums; for Hopper GPUs.

warp     16 or 32 columns at a time: lane = 4 columns of one of 8 or 4 parts at a time; up to 16 parts of each are
         under way at once, so that a usual number of parts takes one round; peaks are asked for with them
"""

import dataclasses
import functools
from typing import Any

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_found import KINDS
from pallas_kernels.mosaic_top_p_threshold import exp, warp_sum

LANE_COLUMNS, LARGEST_COLUMNS, LARGEST_AT_ONCE = 4, 32, 16
# Parts of which the peaks are under way at once, 32 of them each.
PEAKS_AT_ONCE = 4
# Parts of which the sums are under way at once.
LARGEST_SUMMED = 128
LOWEST = -1e30


def columns_of(usual: int) -> int:
    """Columns that are added up at a time, of so many parts as a rule."""
    return LARGEST_COLUMNS if usual <= 32 else LARGEST_COLUMNS // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Where the parts of a query head are in arrays [N,M,..]: `number` of them, from place `first` on, `head` of M."""

    first: Any
    number: Any
    heads: int
    head: Any

    def has(self, part):
        """Whether there is such a part."""
        return m.less(part, self.number)

    def load(self, ref, part, *, size: int = 1, word: Any = 0, words: int = 1):
        """Of a part, `words` words, from a word on of the `size` that an array has of a head. Where there is no such
        part, they are those of another one."""
        nearest = m.maximum_signed(m.minimum_signed(part, m.subtract(self.number, 1)), 0)
        place = m.add(m.multiply(m.add(self.first, nearest), self.heads), self.head)
        at = m.address(ref, m.add(m.multiply(place, size), word))
        return m.load_written(at, words=words)

    def load_floats(self, ref, part, **options):
        """The same of f32."""
        return [m.as_float(word) for word in self.load(ref, part, **options)]


class OutputOfParts:
    """A query head's output.

    peaks and totals [N,M], outs [N,M,C] float32 references; `usual` a number of parts that takes little time; stored in
    a dtype.
    """

    def __init__(self, parts: Parts, peaks, totals, outs, *, columns: int, usual: int, lane, dtype: str):
        self.parts, self.peaks, self.totals, self.outs, self.columns = parts, peaks, totals, outs, columns
        self.usual, self.lane, self.dtype = usual, lane, dtype

    def _add_up(self):
        """The largest peak, and the total in units of e^peak."""
        at_once = min(PEAKS_AT_ONCE, -(-self.usual // 32))

        def add(i, carried):
            peak, total = carried
            loads = []
            for j in range(at_once):
                part = m.add(self.lane, m.multiply(m.add(m.multiply(i, at_once), j), 32))
                is_real = self.parts.has(part)
                loads.append((is_real, *(self.parts.load_floats(x, part)[0] for x in (self.peaks, self.totals))))
            loads = [(m.select(is_real, x, LOWEST), m.select(is_real, weight, 0.0)) for is_real, x, weight in loads]
            new_peak = functools.reduce(m.maximum, [x for x, _ in loads], peak)
            parts = [(peak, total), *loads]
            terms = [m.multiply_float(weight, exp(m.subtract_float(x, new_peak))) for x, weight in parts]
            return [new_peak, functools.reduce(m.add_float, terms)]

        rounds = m.divide(m.add(self.parts.number, 32 * at_once - 1), 32 * at_once)
        peak, total = m.loop(rounds, [m.value(LOWEST), m.value(0.0)], add)
        highest = warp_sum(peak, m.maximum)
        return highest, warp_sum(m.multiply_float(total, exp(m.subtract_float(peak, highest))), m.add_float)

    def store(self, first_column, out, place, size: int):
        """`columns_of(usual)` columns of the output, of `size` that are real, to `out`, of whose numbers one is the
        head's first."""
        lanes = columns_of(self.usual) // LANE_COLUMNS
        apart = 32 // lanes
        at_once = min(LARGEST_AT_ONCE, -(-self.usual // apart))
        mine = m.add(first_column, m.multiply(m.bit_and(self.lane, lanes - 1), LANE_COLUMNS))
        first_part = m.divide(self.lane, lanes)

        def ask(i):
            loads = []
            for j in range(at_once):
                part = m.add(m.add(first_part, apart * j), m.multiply(i, apart * at_once))
                is_real, (peak,) = self.parts.has(part), self.parts.load_floats(self.peaks, part)
                values = self.parts.load_floats(self.outs, part, size=self.columns, word=mine, words=LANE_COLUMNS)
                loads.append((is_real, peak, values))
            return loads

        def add(loads, sums):
            for is_real, peak, values in loads:
                weight = m.select(is_real, exp(m.subtract_float(peak, highest)), 0.0)
                # A part that is not real may hold anything.
                values = [m.select(is_real, x, 0.0) for x in values]
                sums = [m.fma(weight, x, so_far) for x, so_far in zip(values, sums, strict=True)]
            return sums

        first_loads = ask(m.value(0))
        highest, total = self._add_up()
        sums = add(first_loads, [m.value(0.0)] * LANE_COLUMNS)
        rounds = m.divide(m.add(self.parts.number, apart * at_once - 1), apart * at_once)
        more = m.subtract(m.maximum_signed(rounds, 1), 1)
        sums = m.loop(more, sums, lambda i, sums: add(ask(m.add(i, 1)), sums))
        step = lanes
        while step < 32:
            sums = [m.add_float(x, m.shuffle_xor(x, step)) for x in sums]
            step *= 2
        self._store_columns(sums, total, mine, out, place, size, m.less(self.lane, lanes))

    def _store_columns(self, sums, total, column, out, place, size: int, where):
        """To neighbouring columns, of a size that is even."""
        # An empty list has no parts, and gives zero.
        over_total = m.select(m.less_float(total, 1e-30), 0.0, m.reciprocal(total))
        values = [m.multiply_float(x, over_total) for x in sums]
        first = m.add(place, column)
        is_whole = self.dtype == "float32"
        # Of two bytes, two are a word; places and columns are even.
        at = m.address(out, first if is_whole else m.right(first, 1))
        for i in range(0, len(values), 2):
            pair = values[i : i + 2]
            words = list(map(m.as_int, pair)) if is_whole else [m.pack_pair(self.dtype, *pair)]
            is_real = m.both(where, m.less(m.add(column, i), size))
            m.store(at, words, offset=(4 if is_whole else 2) * i, where=is_real)


class SumOfParts:
    """A query head's sums, of [N,M,KINDS]; `usual` a number of parts that takes little time. Lane 8 i + kind adds up
    every fourth part. What a round takes is on its way when this is made."""

    def __init__(self, parts: Parts, sums, *, usual: int, lane):
        self.parts, self._sums, self._lane = parts, sums, lane
        self._at_once = -(-min(usual, LARGEST_SUMMED) // 4)
        self._loads = self._load(m.value(0))

    def _load(self, i):
        kind, loads = m.bit_and(self._lane, KINDS - 1), []
        for j in range(self._at_once):
            part = m.add(m.right(self._lane, 3), m.multiply(m.add(m.multiply(i, self._at_once), j), 4))
            loads.append((part, self.parts.load(self._sums, part, size=KINDS, word=kind)[0]))
        return loads

    def _add(self, total, loads):
        mine = [m.select(self.parts.has(part), m.as_float(word), 0.0) for part, word in loads]
        return functools.reduce(m.add_float, mine, total)

    def result(self):
        """`KINDS` f32, the same in all lanes."""
        rounds = m.divide(m.add(self.parts.number, 4 * self._at_once - 1), 4 * self._at_once)
        more = m.subtract(m.maximum_signed(rounds, 1), 1)
        mine = self._add(m.value(0.0), self._loads)
        (mine,) = m.loop(more, [mine], lambda i, total: [self._add(total[0], self._load(m.add(i, 1)))])
        for lanes in (8, 16):
            mine = m.add_float(mine, m.shuffle_xor(mine, lanes))
        return [m.shuffle(mine, kind) for kind in range(KINDS)]
