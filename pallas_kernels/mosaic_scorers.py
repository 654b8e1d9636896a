"""Proxy scores on the binary tensor core, by one warp, and their bins; for Hopper GPUs.

mma.m16n8k128 (b1, and, popc) multiplies 16 tokens' bits with 8 columns of bits. The packed code words are its A
fragments as they lie in memory; the columns are bit planes of INT4 queries.

    A   lane 4 g + t holds word t of the codes in rows g and g + 8
    B   lane 4 g + t holds word t of column g; column 2 h + b of product p is bit plane 2 p + b of head h, of 4 heads
    C   lane 4 g + t gets columns 2 t, 2 t + 1 of rows g and g + 8: after products 0 and 1, all four planes of head t

    <u, bits> = plane 0 + 2 plane 1 + 4 plane 2 - 8 plane 3

Codes of 64 bits lie two to a row; the columns then come twice, for the even tokens and for the odd ones, with zeros
over the other token's words. Longer codes take several products, one for each 4 words.

A warp scores 32 tokens at a time, in two products of 16; lane 4 g + t ends with tokens 4 g .. 4 g + 3 of head t. Codes
come by way of shared memory, where they are some steps before they are scored (mosaic_code_copies.py).

A depth becomes an integer of 16 bits, in steps of 1/256 of a bin: its second byte is the bin, the lowest one the place
in it.
"""

import dataclasses
import functools
import math
from typing import Any

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import (
    BINS,
    BINS_PER_NAT,
    HEADS,
    LOG2_E,
    PLACES,
    State,
    word_of,
)
from pallas_kernels.mosaic_code_copies import STAGES, STEP_TOKENS, WARPS, CodeCopies, RunSizes

LEAST_BLOCK_TOKENS = STEP_TOKENS * WARPS
# A word counts a block's tokens in 12 bits, above 20 bits for the sum of their places in a bin, of 0 to 255 each.
COUNT_BITS = 20
# The deepest that is told from less deep; depths are shares of it.
DEEPEST = BINS - 1 / PLACES
# 1.5 * 2^23: plus an integer n, it has n in its lowest bits.
MAGIC = 1.5 * 2.0**23


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a launch: `block` tokens of a row a block, `in_row` steps of a warp in a round of its loop."""

    kv_heads: int
    group: int
    groups: int
    tokens: int
    words: int
    centroids: int
    block: int
    state_words: int
    first: int
    bias_gain: float | None
    noisy: bool
    in_row: int

    @property
    def padded(self) -> int:
        return HEADS * self.groups

    @property
    def run(self) -> RunSizes:
        """Of each warp of a block."""
        arrays = 1 if self.bias_gain is None else 2
        return RunSizes(steps=self.block // LEAST_BLOCK_TOKENS, words=self.words, arrays=arrays)

    @property
    def counter_words(self) -> int:
        """Of shared memory: bins of each head, and peaks."""
        return self.padded * (BINS + 1)


class Scorer:
    """One lane's registers for a row: addresses, B fragments, and factors of its heads."""

    def __init__(
        self, sizes: Sizes, row, start, stop, planes, factors, base, shift, bits, scale, bias, noise, bins, shared,
        all_scored: bool,
    ):  # fmt: skip
        lane, self.warp = m.bit_and(m.thread_index(), 31), m.right(m.thread_index(), 5)
        self.quad, self.t = m.right(lane, 2), m.bit_and(lane, 3)
        self.sizes, self.row, self.stop, self.all_scored = sizes, row, stop, all_scored
        self.shift, self.bins, self.shared = shift, bins, shared
        self.start = m.add(start, m.multiply(self.warp, sizes.run.steps * STEP_TOKENS))
        first = m.add(m.multiply(row, sizes.tokens), self.start)
        self.copies = CodeCopies(sizes.run, first, bits, [scale, *bias], m.add(shared, 4 * sizes.counter_words))
        self.copies.begin()
        self.columns = self._load_columns(planes)
        self.base, self.factors = base, []
        for h in range(sizes.groups):
            gain, minus_sum = map(m.as_float, m.load(m.address(factors, m.left(self._head(h), 1)), words=2))
            (top,) = m.load(m.address(base, self._head(h)))
            self.factors.append(_Factors.of(gain, minus_sum, m.as_float(top)))
        self.half_variances = [self._half_variance(noise, h) for h in range(sizes.groups)] if sizes.noisy else []

    def _half_variance(self, noise, h):
        """- sd^2 / 2 of a unit of scale, of this lane's head of group h."""
        deviation = m.as_float(m.load(m.address(noise, self._head(h)))[0])
        return m.multiply_float(m.multiply_float(deviation, deviation), -0.5)

    def _head(self, h):
        """Index in [R,H] of this lane's head of group h."""
        return m.add(m.multiply(self.row, self.sizes.padded), m.add(self.t, HEADS * h))

    def _load_columns(self, planes):
        """B fragments: [group][product][step of 4 words, or even and odd tokens]."""
        words = self.sizes.words
        head, plane = m.right(self.quad, 1), m.bit_and(self.quad, 1)
        column = m.add(m.multiply(m.add(m.multiply(self.row, self.sizes.padded), head), 4), plane)
        at = m.address(planes, m.add(m.multiply(column, words), m.bit_and(self.t, min(words, 4) - 1)))

        def load(h, p):
            offset = 4 * (4 * HEADS * h + 2 * p) * words
            if words == 2:
                word, is_even = m.load(at, offset=offset)[0], m.less(self.t, 2)
                return [m.select(is_even, word, 0), m.select(is_even, 0, word)]
            return [m.load(at, offset=offset + 16 * k)[0] for k in range(words // 4)]

        return [[load(h, p) for p in range(2)] for h in range(self.sizes.groups)]

    def no_peaks(self):
        return [m.value(float("-inf"))] * self.sizes.groups

    def run(self):
        """Score this warp's tokens; returns the largest scores, one a group."""
        steps, groups = self.sizes.run.steps, self.sizes.groups
        in_row = math.gcd(steps, self.sizes.in_row)

        def some(i, carried):
            for j in range(in_row):
                step = m.add(m.multiply(i, in_row), j)
                stage = m.bit_and(step, STAGES - 1)
                following = self._shifts(m.minimum_signed(m.add(step, 1), steps - 1))
                self.copies.arrive(step, stage)
                carried = [*following, *self._score(step, stage, carried[:groups], carried[groups:])]
            return carried

        return m.loop(steps // in_row, [*self._shifts(m.value(0)), *self.no_peaks()], some)[groups:]

    def _first_token(self, i):
        """Of step i, in the row."""
        return m.add(self.start, m.multiply(i, STEP_TOKENS))

    def _shifts(self, i):
        """Of step i, one a group."""
        sizes = self.sizes
        centroid = m.divide(self._first_token(i), sizes.tokens // sizes.centroids)
        return [
            m.as_float(m.load(m.address(self.shift, m.add(m.multiply(self._head(h), sizes.centroids), centroid)))[0])
            for h in range(sizes.groups)
        ]

    def _score(self, i, stage, shifts, peaks):
        """Bins of four tokens for this lane's head of each group: stored, and counted where they are in range."""
        sizes = self.sizes
        token = m.add(self._first_token(i), m.left(self.quad, 2))
        fragments, (scale_words, *bias_words) = self.copies.fragments(stage), self.copies.halves(i)
        scale = [x for word in scale_words for x in m.bfloat16_pair(word)]
        # Unsigned: a token before the first one is far above.
        scored = [
            None
            if self.all_scored
            else m.less(m.subtract(m.add(token, j), sizes.first), m.subtract(self.stop, sizes.first))
            for j in range(4)
        ]
        for h in range(sizes.groups):
            dots = _dots(fragments, self.columns[h])
            scores = [self.factors[h].score(dots[j], scale[j], shifts[h]) for j in range(4)]
            for words in bias_words:
                bias = [x for word in words for x in m.bfloat16_pair(word)]
                scores = [m.fma(x, sizes.bias_gain, z) for x, z in zip(bias, scores, strict=True)]
            packed, peaks = self.see_scores(h, scores, scale, scale_words, scored, peaks)
            head = m.add(self.t, HEADS * h)
            word = word_of(self.row, token, head, sizes.group, sizes.tokens)
            real = None if HEADS * h + HEADS <= sizes.group else m.less(head, sizes.group)
            m.store(m.address(self.bins, word), [packed], where=real)
        return peaks

    def see_scores(self, h, scores, scales, scale_words, scored, peaks):
        """Count four tokens' scores in their bins: a word of these; and the largest scores so far."""
        del scales, scale_words
        depths, peak = self._count(h, scores, scored, peaks[h])
        return m.pack_second_bytes([steps for steps, _ in depths]), [*peaks[:h], peak, *peaks[h + 1 :]]

    def _count(self, h, scores, scored, peak):
        """Depths of scores, as integers of `_steps` and from 0 to 1; and the largest score so far, or NaN."""
        depths = []
        for z, is_scored in zip(scores, scored, strict=True):
            larger = m.maximum_or_nan(peak, z)
            peak = larger if is_scored is None else m.select(is_scored, larger, peak)
            depth = _saturate(z, -BINS_PER_NAT / DEEPEST, self.factors[h].top)
            steps = _steps(depth)
            # 1, above its place in the bin. Of sharp heads most tokens would meet in the last one.
            bin_ = m.second_byte(steps)
            is_counted = m.less(bin_, BINS - 1)
            is_counted = is_counted if is_scored is None else m.both(is_scored, is_counted)
            self._add(h, bin_, m.with_lowest_byte(1 << COUNT_BITS, steps), is_counted)
            depths.append((steps, depth))
        return depths, peak

    def _add(self, h, bin_, word, where):
        """Add to the word of a bin in shared memory, [group][bin][head of 4]."""
        mine = m.add(self.shared, m.left(self.t, 2))
        m.add_shared(m.add(m.left(bin_, 4), mine), word, offset=4 * HEADS * BINS * h, where=where)

    def flush(self, peaks, state: State):
        """Add the block's bins, and its largest scores, one a group and lane, to the row's."""
        sizes, shared, lane = self.sizes, self.shared, m.bit_and(m.thread_index(), 31)
        for h, mine in enumerate(peaks):
            mine = m.minimum(mine, 3e38)
            # Asked for again, so that no register holds it while tokens are scored.
            base = m.as_float(m.load_written(m.address(self.base, self._head(h)))[0])
            peak = mine
            for lanes in (4, 8, 16):
                peak = m.maximum(peak, m.shuffle_xor(peak, lanes))
            at = m.add(m.add(shared, 4 * (sizes.padded * BINS + HEADS * h)), m.left(lane, 2))
            m.when(m.less(lane, HEADS), functools.partial(m.max_shared, at, _key(peak)))
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
        for h in range(sizes.groups):
            for i in range(BINS // m.WARPGROUP):
                bin_ = m.add(m.thread_index(), m.WARPGROUP * i)
                four = m.load_shared(m.add(shared, m.left(bin_, 4)), words=4, offset=4 * HEADS * BINS * h)
                for head, word in enumerate(four):
                    places, count = m.bit_and(word, 2**COUNT_BITS - 1), m.right(word, COUNT_BITS)
                    m.add_global_pair(state.bin(m.value(HEADS * h + head), bin_), places, count)

        def keep_peak():
            m.max_global(state.peak(m.thread_index()), m.load_shared(_peak_address(sizes, shared))[0])

        m.when(m.less(m.thread_index(), sizes.padded), keep_peak)


class NoisyScorer(Scorer):
    """Of scores with noise: counts debiased logits z - sd^2 / 2, and gives the bins of z + sd^2 / 2. Carries the
    largest scale besides, as two bfloat16 of which the larger one counts."""

    def no_peaks(self):
        return [*super().no_peaks(), m.value(0)]

    def see_scores(self, h, scores, scales, scale_words, scored, peaks):
        halves = [m.multiply_float(m.multiply_float(scale, scale), self.half_variances[h]) for scale in scales]
        debiased = [m.add_float(z, half) for half, z in zip(halves, scores, strict=True)]
        depths, peak = self._count(h, debiased, scored, peaks[h])
        # z + sd^2 / 2 is sd^2 less deep, and at most that where the last bin has cut a depth off.
        twice = 2 * BINS_PER_NAT / DEEPEST
        raised = [_saturate(half, twice, depth) for half, (_, depth) in zip(halves, depths, strict=True)]
        packed = m.pack_second_bytes([_steps(depth) for depth in raised])
        largest = self._largest_scale(peaks[-1], scale_words, scored) if h == 0 else peaks[-1]
        return packed, [*peaks[:h], peak, *peaks[h + 1 : -1], largest]

    def _largest_scale(self, largest, words, scored):
        for word, first, second in zip(words, scored[::2], scored[1::2], strict=True):
            if not self.all_scored:
                low, high = m.select(first, 0xFFFF, 0), m.select(second, 0xFFFF0000, 0)
                word = m.bit_and(word, m.bit_or(low, high))
            largest = m.larger_halves(largest, word)
        return largest

    def flush(self, peaks, state: State):
        *peaks, largest = peaks
        # The lanes of a quad have seen the same tokens.
        for lanes in (4, 8, 16):
            largest = m.larger_halves(largest, m.shuffle_xor(largest, lanes))
        largest = m.maximum(*m.bfloat16_pair(largest))
        raise_largest = functools.partial(m.max_global, state.largest_scale(), m.as_int(largest))
        m.when(m.less(m.bit_and(m.thread_index(), 31), 1), raise_largest)
        super().flush(peaks, state)


@dataclasses.dataclass
class _Factors:
    """A head's, that scores are made with: the gain; minus gain MAGIC, which is exact; the bits of MAGIC, less the sum
    of levels; and where the first bin begins, as a depth."""

    gain: Any
    minus_magic: Any
    bits: Any
    top: Any

    @classmethod
    def of(cls, gain, minus_sum, base):
        # Cut to 22 bits, so that a product with MAGIC, which has two, is exact.
        gain = m.as_float(m.bit_and(m.as_int(gain), 0xFFFFFFFC))
        return cls(
            gain,
            m.multiply_float(gain, -MAGIC),
            m.as_int(m.add_float(minus_sum, MAGIC)),
            m.multiply_float(base, BINS_PER_NAT / DEEPEST),
        )

    def score(self, planes, scale, shift):
        """gain (2 <u, bits> - sum of u) scale + shift, of the products with bit planes of four weights."""
        low, high = (planes[0], planes[1]), (planes[2], planes[3])
        twice_low = m.left(m.add(low[0], m.left(low[1], 1)), 1)
        dot = m.add(m.add(twice_low, self.bits), m.left(m.subtract(high[0], m.left(high[1], 1)), 3))
        return m.fma(m.fma(self.gain, m.as_float(dot), self.minus_magic), scale, shift)


def _dots(fragments, columns):
    """The products of four tokens in order with bit planes 0 to 3."""
    if len(fragments) == 2:  # two tokens a row
        even, odd = (_product(fragments, [[step[i]] for step in columns]) for i in range(2))
        return [even[0], odd[0], even[1], odd[1]]
    return _product(fragments[:2], columns) + _product(fragments[2:], columns)


def _product(rows, columns):
    """The products of two rows' fragments [row][step] with the columns of products 0 and 1, [product][step]."""
    low, high = [0] * 4, [0] * 4
    for k in range(len(columns[0])):
        fragment = [row[k] for row in rows]
        low = m.binary_product(fragment, columns[0][k], low)
        high = m.binary_product(fragment, columns[1][k], high)
    return [(low[i], low[i + 1], high[i], high[i + 1]) for i in (0, 2)]


def _saturate(x, factor, addend):
    """x factor + addend, from 0 to 1; 0 for NaN."""
    return m.ptx("fma.rn.sat.f32 $0, $1, $2, $3;", [x, factor, addend], "f")[0]


def _steps(depth):
    """An i32 whose lowest 16 bits are a depth, from 0 to 1, in steps of 1/256 of a bin; the others mean nothing."""
    return m.as_int(m.fma(depth, PLACES * DEEPEST, 2.0**23))


def clear_shared(sizes: Sizes, shared):
    """Bins and peaks to 0."""
    words = sizes.padded * BINS
    for i in range(words // (4 * m.WARPGROUP)):
        m.store_shared(m.add(shared, m.left(m.thread_index(), 4)), [m.value(0)] * 4, offset=16 * m.WARPGROUP * i)
    clear_peaks = lambda: m.store_shared(_peak_address(sizes, shared), [m.value(0)])  # noqa: E731
    m.when(m.less(m.thread_index(), sizes.padded), clear_peaks)
    m.barrier()


def _peak_address(sizes: Sizes, shared):
    """Shared address of the thread's peak."""
    return m.add(m.add(shared, 4 * sizes.padded * BINS), m.left(m.thread_index(), 2))


def _key(x):
    """An unsigned number in the order of the f32, above 0."""
    bits = m.as_int(x)
    return m.bit_xor(bits, m.bit_or(m.right_signed(bits, 31), 0x80000000))
