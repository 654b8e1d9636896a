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
import math
from typing import Any

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, HEADS, PLACES, word_of
from pallas_kernels.mosaic_code_copies import STAGES, STEP_TOKENS, WARPS, CodeCopies, RunSizes
from pallas_kernels.mosaic_counters import Counters

LEAST_BLOCK_TOKENS = STEP_TOKENS * WARPS
# The deepest that is told from less deep; depths are shares of it.
DEEPEST = BINS - 1 / PLACES
DEPTHS_PER_NAT = BINS_PER_NAT / DEEPEST
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


class Scorer:
    """One lane's registers for a row: addresses, B fragments, and factors of its heads."""

    def __init__(
        self, sizes: Sizes, row, start, stop, planes, factors, base, shift, bits, scale, bias, noise, bins,
        counters: Counters, shared, all_scored: bool,
    ):  # fmt: skip
        lane, self.warp = m.bit_and(m.thread_index(), 31), m.right(m.thread_index(), 5)
        self.quad, self.t = m.right(lane, 2), m.bit_and(lane, 3)
        self.sizes, self.row, self.stop, self.all_scored = sizes, row, stop, all_scored
        self.shift, self.bins, self.counters = shift, bins, counters
        self.start = m.add(start, m.multiply(self.warp, sizes.run.steps * STEP_TOKENS))
        first = m.add(m.multiply(row, sizes.tokens), self.start)
        self.copies = CodeCopies(sizes.run, first, bits, [scale, *bias], shared)
        self.copies.begin()
        self.columns = self._load_columns(planes)
        self.factors, self.tops = [], []
        for h in range(sizes.groups):
            gain, minus_sum = map(m.as_float, m.load(m.address(factors, m.left(self._head(h), 1)), words=2))
            self.factors.append(_Factors.of(gain, minus_sum))
            (first,) = m.load(m.address(base, self._head(h)))
            self.tops.append(m.multiply_float(m.as_float(first), DEPTHS_PER_NAT))
        self.half_variances = [self._half_variance(noise, h) for h in range(sizes.groups)] if sizes.noisy else []

    def _half_variance(self, noise, h):
        """sd^2 / 2 of a unit of scale, as a depth, of this lane's head of group h."""
        deviation = m.as_float(m.load(m.address(noise, self._head(h)))[0])
        return m.multiply_float(m.multiply_float(deviation, deviation), 0.5 * DEPTHS_PER_NAT)

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

    def run(self):
        """Score this warp's tokens; returns the least depths, one a group."""
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

        nothing = [m.value(float("inf"))] * groups
        return m.loop(steps // in_row, [*self._shifts(m.value(0)), *nothing], some)[groups:]

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

    def _score(self, i, stage, shifts, least):
        """Bins of four tokens for this lane's head of each group: stored, and counted where they are in range."""
        sizes = self.sizes
        token = m.add(self._first_token(i), m.left(self.quad, 2))
        fragments, halves = self.copies.fragments(stage), self.copies.halves(i)
        scale, *biases = [[x for word in words for x in m.bfloat16_pair(word)] for words in halves]
        scored = [None if self.all_scored else self._is_scored(token, j) for j in range(4)]
        bias_gain = -DEPTHS_PER_NAT * (sizes.bias_gain or 0.0)
        for h in range(sizes.groups):
            slopes = [self.factors[h].slope(planes) for planes in _dots(fragments, self.columns[h])]
            offsets = [m.fma(shifts[h], -DEPTHS_PER_NAT, self.tops[h])] * 4
            for bias in biases:
                offsets = [m.fma(x, bias_gain, y) for x, y in zip(bias, offsets, strict=True)]
            lines = [_Line(*line) for line in zip(slopes, scale, offsets, strict=True)]
            packed, least = self.see(h, lines, scored, least)
            head = m.add(self.t, HEADS * h)
            word = word_of(self.row, token, head, sizes.group, sizes.tokens)
            real = None if HEADS * h + HEADS <= sizes.group else m.less(head, sizes.group)
            m.store(m.address(self.bins, word), [packed], where=real)
        return least

    def _is_scored(self, token, j: int):
        # Unsigned: a token before the first one is far above.
        return m.less(m.subtract(m.add(token, j), self.sizes.first), m.subtract(self.stop, self.sizes.first))

    def see(self, h, lines: "list[_Line]", scored, least):
        """Count four tokens in the bins of their scores: a word of these; and the least depths so far."""
        steps, least = self._count(h, lines, scored, least)
        return m.pack_second_bytes(steps), least

    def _count(self, h, lines: "list[_Line]", scored, least):
        """`_steps` of four depths, and the least depths so far, or NaN."""
        of_tokens, mine = [], least[h]
        for line, is_scored in zip(lines, scored, strict=True):
            less = m.minimum_or_nan(mine, line.depth())
            mine = less if is_scored is None else m.select(is_scored, less, mine)
            steps = _steps(line.cut_depth())
            # Of sharp heads most tokens would meet in the last bin.
            is_counted = m.less(m.second_byte(steps), BINS - 1)
            is_counted = is_counted if is_scored is None else m.both(is_scored, is_counted)
            self.counters.add(h, steps, is_counted)
            of_tokens.append(steps)
        return of_tokens, [*least[:h], mine, *least[h + 1 :]]


class NoisyScorer(Scorer):
    """Of scores with noise: counts debiased logits z - sd^2 / 2, and gives the bins of z + sd^2 / 2."""

    def see(self, h, lines: "list[_Line]", scored, least):
        _, least = self._count(h, [line.deeper(self.half_variances[h]) for line in lines], scored, least)
        raised = [line.deeper(m.subtract_float(0.0, self.half_variances[h])).cut_depth() for line in lines]
        return m.pack_second_bytes([_steps(depth) for depth in raised]), least

    def run(self):
        """As for scores without noise; and the largest scale of the warp's tokens, f32."""
        return [*super().run(), self._largest_scale()]

    def _largest_scale(self):
        largest = m.value(0)
        for token, word in self.copies.scale_words():
            if not self.all_scored:
                token = m.add(self.start, token)
                low = m.select(self._is_scored(token, 0), 0xFFFF, 0)
                high = m.select(self._is_scored(token, 1), 0xFFFF0000, 0)
                word = m.bit_and(word, m.bit_or(low, high))
            # A NaN loses.
            largest = m.larger_halves(largest, word)
        for lanes in (1, 2, 4, 8, 16):
            largest = m.larger_halves(largest, m.shuffle_xor(largest, lanes))
        return m.maximum(*m.bfloat16_pair(largest))


@dataclasses.dataclass
class _Line:
    """A token's depth: slope scale + offset."""

    slope: Any
    scale: Any
    offset: Any

    def depth(self):
        return m.fma(self.slope, self.scale, self.offset)

    def cut_depth(self):
        """From 0 to 1; 0 for NaN."""
        return m.ptx("fma.rn.sat.f32 $0, $1, $2, $3;", [self.slope, self.scale, self.offset], "f")[0]

    def deeper(self, curve):
        """By curve scale^2."""
        return _Line(m.fma(curve, self.scale, self.slope), self.scale, self.offset)


@dataclasses.dataclass
class _Factors:
    """A head's, that slopes are made with: the gain; minus gain MAGIC, which is exact; and the bits of MAGIC, less the
    sum of levels."""

    gain: Any
    minus_magic: Any
    bits: Any

    @classmethod
    def of(cls, gain, minus_sum):
        # Cut to 22 bits, so that a product with MAGIC, which has two, is exact.
        gain = m.as_float(m.bit_and(m.as_int(m.multiply_float(gain, -DEPTHS_PER_NAT)), 0xFFFFFFFC))
        return cls(gain, m.multiply_float(gain, -MAGIC), m.as_int(m.add_float(minus_sum, MAGIC)))

    def slope(self, planes):
        """The depth of gain (2 <u, bits> - sum of u), of the products with bit planes of four weights."""
        low, high = (planes[0], planes[1]), (planes[2], planes[3])
        twice_low = m.left(m.add(low[0], m.left(low[1], 1)), 1)
        dot = m.add(m.add(twice_low, self.bits), m.left(m.subtract(high[0], m.left(high[1], 1)), 3))
        return m.fma(self.gain, m.as_float(dot), self.minus_magic)


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


def _steps(depth):
    """An i32 whose lowest 16 bits are a depth, from 0 to 1, in steps of 1/256 of a bin; the others mean nothing."""
    return m.as_int(m.fma(depth, PLACES * DEEPEST, 2.0**23))
