"""Proxy scores on the binary tensor core, by one warp, and their bins; for Hopper GPUs.

mma.m16n8k128 (b1, and, popc) multiplies 16 tokens' bits with 8 columns of bits. The packed code words are its A
fragments as they lie in memory; the columns are bit planes of INT4 queries.

    A   lane 4 g + t holds word t of the codes in rows g and g + 8
    B   lane 4 g + t holds word t of column g; column 2 h + b of product p is bit plane 2 p + b of head h, of 4 heads
    C   lane 4 g + t gets columns 2 t, 2 t + 1 of rows g and g + 8: after products 0 and 1, all four planes of head t

    <u, bits> = plane 0 + 2 plane 1 + 4 plane 2 - 8 plane 3

Codes of 64 bits lie two to a row; the columns then come twice, for the even tokens and for the odd ones, with zeros
over the other token's words. Longer codes take several products, one for each 4 words.

A warp scores 32 tokens at a time, in two products of 16; lane 4 g + t ends with tokens 4 g .. 4 g + 3 of head t.
"""

import dataclasses
import functools

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

STEP_TOKENS = 32
WARPS = 4
LEAST_BLOCK_TOKENS = STEP_TOKENS * WARPS
# A word counts a block's tokens in 12 bits, above 20 bits for the sum of their places in a bin, of 0 to 256 each.
COUNT_BITS = 20
# The bits of 1.5 * 2^23 as a float32: plus an integer n, they are those of 1.5 * 2^23 + n.
MAGIC = 0x4B400000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
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

    @property
    def padded(self) -> int:
        return HEADS * self.groups


class Scorer:
    """One lane's registers for a row: addresses, B fragments, and factors of its heads."""

    def __init__(
        self, sizes: Sizes, row, stop, planes, factors, base, shift, bits, scale, bias, noise, bins, shared,
        all_scored: bool,
    ):  # fmt: skip
        lane, self.warp = m.bit_and(m.thread_index(), 31), m.right(m.thread_index(), 5)
        self.quad, self.t = m.right(lane, 2), m.bit_and(lane, 3)
        self.sizes, self.row, self.stop, self.all_scored = sizes, row, stop, all_scored
        self.shift, self.bits, self.scale, self.bias, self.bins, self.shared = shift, bits, scale, bias, bins, shared
        self.columns = self._load_columns(planes)
        self.factors, self.bases = [], []
        for h in range(sizes.groups):
            gain, minus_sum = map(m.as_float, m.load(m.address(factors, m.left(self._head(h), 1)), words=2))
            self.bases.append(m.as_float(m.load(m.address(base, self._head(h)))[0]))
            # Half a bin less: the conversion to an integer rounds to nearest.
            top = m.fma(self.bases[-1], BINS_PER_NAT / (BINS - 1), -0.5 / (BINS - 1))
            self.factors.append((m.add_float(gain, gain), m.multiply_float(gain, minus_sum), top))
        self.half_variances = [self._half_variance(noise, h) for h in range(sizes.groups)] if sizes.noisy else []

    def _half_variance(self, noise, h):
        """Of a unit of scale, of this lane's head of group h: - sd^2 / 2, and - sd^2 as a depth."""
        deviation = m.as_float(m.load(m.address(noise, self._head(h)))[0])
        variance = m.multiply_float(deviation, deviation)
        return m.multiply_float(variance, -0.5), m.multiply_float(variance, -BINS_PER_NAT / (BINS - 1))

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

    def __call__(self, start, i, peaks):
        """Score the next of this warp's tokens; returns the largest scores so far, one a group."""
        first = m.add(m.add(start, m.multiply(i, LEAST_BLOCK_TOKENS)), m.multiply(self.warp, STEP_TOKENS))
        token = m.add(first, m.multiply(self.quad, 4))
        return self._score(token, *self._load(token), peaks)

    def _load(self, token):
        """A fragments of tokens .. + 3, [row][step of 4 words]; their scales; biases or None; shifts, one a group."""
        sizes = self.sizes
        at = m.add(m.multiply(self.row, sizes.tokens), token)
        words = m.address(self.bits, m.add(m.multiply(at, sizes.words), self.t))
        row_words = max(sizes.words, 4)
        fragments = [
            [m.load(words, offset=4 * (row * row_words + 4 * k))[0] for k in range(row_words // 4)]
            for row in range(4 * sizes.words // row_words)
        ]
        scale, *bias = (
            [x for w in m.load(m.address(x, m.right(at, 1)), words=2) for x in m.bfloat16_pair(w)]
            for x in (self.scale, *self.bias)
        )
        centroid = m.divide(token, sizes.tokens // sizes.centroids)
        shifts = [
            m.as_float(m.load(m.address(self.shift, m.add(m.multiply(self._head(h), sizes.centroids), centroid)))[0])
            for h in range(sizes.groups)
        ]
        return fragments, scale, bias[0] if bias else None, shifts

    def _score(self, token, fragments, scale, bias, shifts, peaks):
        """Bins of four tokens for this lane's head of each group: stored, and counted where they are in range."""
        sizes = self.sizes
        # Unsigned: a token before the first one is far above.
        scored = [
            None
            if self.all_scored
            else m.less(m.subtract(m.add(token, i), sizes.first), m.subtract(self.stop, sizes.first))
            for i in range(4)
        ]
        for h in range(sizes.groups):
            gain, offset, _ = self.factors[h]
            dots = _dots(fragments, self.columns[h])
            scores = [_affine(dots[i], gain, offset, scale[i], shifts[h]) for i in range(4)]
            if bias is not None:
                scores = [m.fma(x, sizes.bias_gain, z) for x, z in zip(bias, scores, strict=True)]
            packed, peaks = self.see_scores(h, scores, scale, scored, peaks)
            head = m.add(self.t, HEADS * h)
            word = word_of(self.row, token, head, sizes.group, sizes.tokens)
            real = None if HEADS * h + HEADS <= sizes.group else m.less(head, sizes.group)
            m.store(m.address(self.bins, word), [m.pack_bytes(packed)], where=real)
        return peaks

    def see_scores(self, h, scores, scales, scored, peaks):
        """Count four tokens' scores in their bins: i32 whose lowest bytes these are; and the largest scores so far."""
        del scales
        depths, peak = self._count(h, scores, scored, peaks[h])
        return [m.as_int(bin_) for bin_, _ in depths], [*peaks[:h], peak, *peaks[h + 1 :]]

    def _count(self, h, scores, scored, peak):
        """Bins and depths, as `_bin` gives them, and the largest score so far."""
        depths = []
        for z, is_scored in zip(scores, scored, strict=True):
            larger = m.maximum(peak, m.minimum(z, 3e38))
            peak = larger if is_scored is None else m.select(is_scored, larger, peak)
            bin_, depth = _bin(z, self.factors[h][2])
            # 1, above its place in the bin.
            one = m.fma(_place(bin_, depth), float(PLACES), 2.0**23 + 2**COUNT_BITS + PLACES // 2)
            self._add(h, bin_, m.bit_and(m.as_int(one), 2**23 - 1), is_scored)
            depths.append((bin_, depth))
        return depths, peak

    def _add(self, h, bin_, word, where):
        """Add to the word of a bin in shared memory, [group][bin][head of 4]."""
        place = m.add(m.left(m.bit_and(m.as_int(bin_), BINS - 1), 4), m.left(self.t, 2))
        m.add_shared(m.add(self.shared, place), word, offset=4 * HEADS * BINS * h, where=where)

    def flush(self, peaks, state: State):
        """Add the block's bins, and its largest scores, one a group and lane, to the row's."""
        sizes, shared, lane = self.sizes, self.shared, m.bit_and(m.thread_index(), 31)
        for h, (mine, base) in enumerate(zip(peaks, self.bases, strict=True)):
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
    largest scale besides."""

    def no_peaks(self):
        return [*super().no_peaks(), m.value(0.0)]

    def see_scores(self, h, scores, scales, scored, peaks):
        minus_half, over = self.half_variances[h]
        squares = [m.multiply_float(scale, scale) for scale in scales]
        debiased = [m.fma(square, minus_half, z) for square, z in zip(squares, scores, strict=True)]
        depths, peak = self._count(h, debiased, scored, peaks[h])
        # z + sd^2 / 2 is sd^2 less deep, and at most that where the last bin has cut a depth off.
        raised = [_raise(square, over, depth) for square, (_, depth) in zip(squares, depths, strict=True)]
        largest = self._largest_scale(peaks[-1], scales, scored) if h == 0 else peaks[-1]
        return [m.as_int(_bin_at(depth)) for depth in raised], [*peaks[:h], peak, *peaks[h + 1 : -1], largest]

    def _largest_scale(self, largest, scales, scored):
        for scale, is_scored in zip(scales, scored, strict=True):
            larger = m.maximum(largest, scale)
            largest = larger if is_scored is None else m.select(is_scored, larger, largest)
        return largest

    def flush(self, peaks, state: State):
        *peaks, largest = peaks
        # The lanes of a quad have seen the same tokens.
        for lanes in (4, 8, 16):
            largest = m.maximum(largest, m.shuffle_xor(largest, lanes))
        raise_largest = functools.partial(m.max_global, state.largest_scale(), m.as_int(largest))
        m.when(m.less(m.bit_and(m.thread_index(), 31), 1), raise_largest)
        super().flush(peaks, state)


def _dots(fragments, columns):
    """Integer products <u, bits> of four tokens in order, as i32 with MAGIC added."""
    if len(fragments) == 2:  # two tokens a row
        even, odd = (_product(fragments, [[step[i]] for step in columns]) for i in range(2))
        return [even[0], odd[0], even[1], odd[1]]
    return _product(fragments[:2], columns) + _product(fragments[2:], columns)


def _product(rows, columns):
    """The products of two rows' fragments [row][step] with the columns of products 0 and 1, [product][step]."""
    low, high = [MAGIC, 0, MAGIC, 0], [0, 0, 0, 0]
    for k in range(len(columns[0])):
        fragment = [row[k] for row in rows]
        low = m.binary_product(fragment, columns[0][k], low)
        high = m.binary_product(fragment, columns[1][k], high)
    dots = []
    for half in (0, 2):
        upper = m.subtract(high[half], m.left(high[half + 1], 1))
        dots.append(m.add(m.add(low[half], m.left(low[half + 1], 1)), m.left(upper, 2)))
    return dots


def _affine(dot, gain, offset, scale, shift):
    """(gain dot + offset) scale + shift."""
    text = "{ .reg .f32 x; sub.rn.f32 x, $1, 0f4B400000; fma.rn.f32 x, x, $2, $3; fma.rn.f32 $0, x, $4, $5; }"
    return m.ptx(text, [m.as_float(dot), gain, offset, scale, shift], "f")[0]


def _bin(z, top):
    """An f32 whose bits' lowest byte is the bin, and a depth for `_place`."""
    # Saturate 8 (base - z) / 255 to [0, 1], half a bin early, then let 2^23 round it to an integer.
    depth = m.ptx("fma.rn.sat.f32 $0, $1, $2, $3;", [z, -BINS_PER_NAT / (BINS - 1), top], "f")[0]
    return _bin_at(depth), depth


def _bin_at(depth):
    return m.fma(depth, float(BINS - 1), 2.0**23)


def _raise(square, factor, depth):
    """square factor + depth, from 0 to 1."""
    return m.ptx("fma.rn.sat.f32 $0, $1, $2, $3;", [square, factor, depth], "f")[0]


def _place(bin_, depth):
    """Where in its bin a score lies, from -1/2 at the upper edge to 1/2."""
    return m.fma(depth, float(BINS - 1), m.subtract_float(2.0**23, bin_))


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
