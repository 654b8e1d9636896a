"""Queries of a kv head rotated, rounded to INT4 and cut into bit planes, by one block; for Hopper GPUs.

thread    dimensions of the codes, 128 apart: the products of their rows of P with each query head. P comes to shared
          memory in tiles of 32 columns, some tiles ahead
warp      the 32 dimensions of a word of each bit plane

Levels and step are those of equation (1) in README, `rabitq_jax.codes.quantize_query`; the noise is that of equation
(2) in docs/theory.md, `rabitq_jax.error_model.noise_gain`.
"""

import dataclasses
import functools
from typing import Any

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_top_p_threshold import warp_sum
from pallas_kernels.prepare_query import QUERY_LEVEL
from pallas_kernels.threefry import UNIFORM_SHIFT, UNIFORM_STEP, scramble

WARPS, LANES, WORD = 4, 32, 32
PLANES = 4
TILE, STAGES = 32, 2
# Threads read neighbouring rows at once, which must not meet in a bank.
TILE_ROW = TILE + 4
PIECE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationSizes:
    """Of a kv head's query heads [G,D], padded to H, and codes of W words."""

    group: int
    heads: int
    head_dim: int
    words: int
    softmax_scale: float
    noise_gains: tuple[float, float]

    @property
    def codes(self) -> int:
        return WORD * self.words

    @property
    def tiles(self) -> int:
        return self.head_dim // TILE

    @property
    def stages(self) -> int:
        return min(STAGES, self.tiles)

    @property
    def words_of_warp(self) -> int:
        return -(-self.words // WARPS)

    # Places in shared memory, in words: queries [G,D], of each warp the largest numbers and the sums [2,H,4], tiles
    # [stages,32 W,36].
    @property
    def largest_at(self) -> int:
        return self.group * self.head_dim

    @property
    def sums_at(self) -> int:
        return self.largest_at + WARPS * self.heads

    @property
    def tiles_at(self) -> int:
        return self.sums_at + WARPS * self.heads

    @property
    def tile_words(self) -> int:
        return self.codes * TILE_ROW

    @property
    def shared_words(self) -> int:
        return self.tiles_at + self.stages * self.tile_words


class Rotation:
    """A block's work on one kv head.

    query bfloat16 [R,G,D], rotation [32 W,D], query_centroid [R,D] or None; seed [2] and layer [1], or None for
    rounding to nearest; shared: an address, of `RotationSizes.shared_words` words.
    """

    def __init__(self, sizes: RotationSizes, row, query, rotation, query_centroid, seed, layer, shared):
        self.sizes, self.row, self.query, self.rotation, self.query_centroid = (
            sizes, row, query, rotation, query_centroid,
        )  # fmt: skip
        self.seed, self.layer, self._shared = seed, layer, shared
        self.thread = m.thread_index()
        self.lane, self.warp = m.bit_and(self.thread, LANES - 1), m.right(self.thread, 5)
        # Threads without a dimension of their own do what others do, and store nothing.
        codes = [m.add(self.thread, m.WARPGROUP * j) for j in range(sizes.words_of_warp)]
        self.codes = [m.minimum_signed(code, sizes.codes - 1) for code in codes]
        self.code_words = [m.add(self.warp, WARPS * j) for j in range(sizes.words_of_warp)]

    def shared(self, place, word: Any = 0):
        """Address of a word of shared memory, from a place on."""
        return m.add(self._shared, m.left(m.add(word, place), 2))

    def quantize(self, planes, factors, noise):
        """To planes [R,H,4,W], factors [R,H,2] and noise [R,H]; zero for heads that are not real."""
        for i in range(self.sizes.stages):
            self._copy_tile(m.value(i))
        self._share_query()
        # While P is on its way.
        offsets = [[self._rounding(head, code) for head in range(self.sizes.group)] for code in self.codes]
        rotated = self._rotate()
        largest = self._largest(rotated)
        self._store_planes(rotated, largest, offsets, planes)
        m.barrier()
        for first in range(0, self.sizes.heads, WARPS):
            self._store_factors(m.add(self.warp, first), factors, noise)

    def _copy_tile(self, i):
        """Begin to copy columns of P; past the last tile, nothing."""
        sizes, pieces = self.sizes, TILE // PIECE
        part, first = m.bit_and(self.thread, pieces - 1), m.divide(self.thread, pieces)
        column = m.add(m.multiply(i, TILE), m.left(part, 2))
        where = m.less(i, sizes.tiles)
        at_once = m.WARPGROUP // pieces
        to = m.add(self._tile(i), m.left(m.add(m.multiply(first, TILE_ROW), m.left(part, 2)), 2))
        at = m.address(self.rotation, m.add(m.multiply(first, sizes.head_dim), column))
        for code in range(0, sizes.codes, at_once):
            m.copy(
                to, at, words=PIECE, shared_offset=4 * TILE_ROW * code, offset=4 * sizes.head_dim * code, where=where
            )
        m.end_copies()

    def _tile(self, i):
        """Address of a tile's place."""
        stages = self.sizes.stages
        stage = m.subtract(i, m.multiply(m.divide(i, stages), stages))
        return self.shared(self.sizes.tiles_at, m.multiply(stage, self.sizes.tile_words))

    def _share_query(self):
        """q - c_q, to shared memory."""
        sizes = self.sizes
        pairs, half = sizes.group * sizes.head_dim // 2, sizes.head_dim // 2
        for first in range(0, pairs, m.WARPGROUP):
            pair = m.add(self.thread, first)
            is_real, nearest = m.less(pair, pairs), m.minimum_signed(pair, pairs - 1)
            (word,) = m.load(m.address(self.query, m.add(m.multiply(self.row, pairs), nearest)))
            numbers = list(m.bfloat16_pair(word))
            if self.query_centroid is not None:
                dim = m.left(m.subtract(nearest, m.multiply(m.divide(nearest, half), half)), 1)
                at = m.address(self.query_centroid, m.add(m.multiply(self.row, sizes.head_dim), dim))
                centroid = map(m.as_float, m.load(at, words=2))
                numbers = [m.subtract_float(x, c) for x, c in zip(numbers, centroid, strict=True)]
            to, words = self.shared(0, m.left(pair, 1)), [m.as_int(x) for x in numbers]
            m.when(is_real, functools.partial(m.store_shared, to, words))

    def _rounding(self, head: int, code):
        """What is added before a number is rounded down."""
        if self.seed is None:
            return m.value(0.5)
        place = m.add(m.multiply(self.row, self.sizes.group), head)
        counter = m.add(m.multiply(place, self.sizes.codes), code)
        rotate = lambda x, bits: m.bit_or(m.left(x, bits), m.right(x, 32 - bits))  # noqa: E731
        bits = scramble(
            m.load(m.address(self.seed, 0), words=2), counter, m.load(m.address(self.layer, 0))[0],
            add=m.add, xor=m.bit_xor, rotate=rotate,
        )  # fmt: skip
        return m.multiply_float(m.to_float(m.right(bits, UNIFORM_SHIFT)), UNIFORM_STEP)

    def _rotate(self):
        """Of each of the thread's dimensions, the numbers of all heads."""
        sizes = self.sizes

        def add_tile(i, sums):
            m.wait_copies(sizes.stages - 1)
            m.barrier()
            tile = self._tile(i)
            rows = [m.add(tile, m.multiply(code, 4 * TILE_ROW)) for code in self.codes]
            query = self.shared(0, m.multiply(i, TILE))
            for first in range(0, TILE, PIECE):
                heads = [
                    m.load_shared(query, words=PIECE, offset=4 * (head * sizes.head_dim + first))
                    for head in range(sizes.group)
                ]
                of_p = [m.load_shared(row, words=PIECE, offset=4 * first) for row in rows]
                terms = [(x, y) for x in of_p for y in heads]
                for k in range(PIECE):
                    sums = [
                        m.fma(m.as_float(x[k]), m.as_float(y[k]), total)
                        for (x, y), total in zip(terms, sums, strict=True)
                    ]
            if sizes.tiles > sizes.stages:
                # The tile makes way for another one.
                m.barrier()
            self._copy_tile(m.add(i, sizes.stages))
            return sums

        sums = m.loop(sizes.tiles, [m.value(0.0)] * (sizes.group * len(self.codes)), add_tile)
        m.wait_copies(0)
        return [sums[sizes.group * j : sizes.group * (j + 1)] for j in range(len(self.codes))]

    def _largest(self, rotated):
        """Of each head, the largest number without its sign."""
        of_warps = self.shared(self.sizes.largest_at)
        for head, numbers in enumerate(zip(*rotated, strict=True)):
            mine = functools.reduce(m.maximum, [m.maximum(x, m.subtract_float(0.0, x)) for x in numbers])
            store = functools.partial(
                m.store_shared, m.add(of_warps, m.left(self.warp, 2)), [m.as_int(warp_sum(mine, m.maximum))],
                offset=4 * WARPS * head,
            )  # fmt: skip
            m.when(m.less(self.lane, 1), store)
        m.barrier()
        return [self._largest_of(head) for head in range(self.sizes.group)]

    def _largest_of(self, head):
        """The same, once all warps have stored theirs."""
        of_warps = m.load_shared(self.shared(self.sizes.largest_at, m.multiply(head, WARPS)), words=WARPS)
        return functools.reduce(m.maximum, map(m.as_float, of_warps))

    def _store_planes(self, rotated, largest, offsets, planes):
        """Bit planes to `planes`, and of each warp the sums of levels + 8 to shared memory."""
        sizes = self.sizes
        steps = [m.multiply_float(x, 1 / QUERY_LEVEL) for x in largest]
        over_step = [m.reciprocal(m.select(m.less_float(0.0, step), step, 1.0)) for step in steps]
        # Lane 4 head + plane stores a word, of eight heads.
        numbers = [m.add(self.lane, first) for first in range(0, PLANES * sizes.heads, LANES)]
        sums = [m.value(0)] * sizes.group
        for word, row, offset in zip(self.code_words, rotated, offsets, strict=True):
            is_real = m.less(word, sizes.words)
            mine = [m.value(0)] * len(numbers)
            for head in range(sizes.group):
                number = m.fma(row[head], over_step[head], offset[head])
                level = m.floor(m.minimum(number, float(QUERY_LEVEL)))
                for plane in range(PLANES):
                    ones = m.ballot(m.less(0, m.bit_and(level, 1 << plane)))
                    which, place = divmod(PLANES * head + plane, LANES)
                    mine[which] = m.select(m.less(m.bit_xor(self.lane, place), 1), ones, mine[which])
                    # The highest plane's ones stand for -8.
                    count = m.count_ones(ones if plane < PLANES - 1 else m.bit_xor(ones, 0xFFFFFFFF))
                    sums[head] = m.add(sums[head], m.select(is_real, m.left(count, plane), 0))
            for number, plane_word in zip(numbers, mine, strict=True):
                place = m.add(m.multiply(self.row, PLANES * sizes.heads), number)
                at = m.address(planes, m.add(m.multiply(place, sizes.words), word))
                m.store(at, [plane_word], where=m.both(is_real, m.less(number, PLANES * sizes.heads)))
        for head, total in enumerate(sums):
            at = self.shared(sizes.sums_at + WARPS * head, self.warp)
            m.when(m.less(self.lane, 1), functools.partial(m.store_shared, at, [total]))

    def _store_factors(self, head, factors, noise):
        """What the kernel says of a head besides; its warp does."""
        sizes, is_real = self.sizes, m.less(head, self.sizes.group)
        nearest = m.minimum_signed(head, sizes.group - 1)
        step = m.multiply_float(self._largest_of(nearest), 1 / QUERY_LEVEL)
        of_warps = m.load_shared(self.shared(sizes.sums_at, m.multiply(nearest, WARPS)), words=WARPS)
        minus_sum = m.subtract_float(float(8 * sizes.codes), m.to_float(functools.reduce(m.add, of_warps)))
        squares, at = m.value(0.0), self.shared(0, m.add(m.multiply(nearest, sizes.head_dim), self.lane))
        for first in range(0, sizes.head_dim, LANES):
            (x,) = map(m.as_float, m.load_shared(at, offset=4 * first))
            squares = m.fma(x, x, squares)
        of_norm, of_step = sizes.noise_gains
        norm2 = m.multiply_float(warp_sum(squares, m.add_float), of_norm)
        gain = m.square_root(m.fma(m.multiply_float(step, step), of_step, norm2))
        place = m.add(m.multiply(self.row, sizes.heads), head)
        numbers = m.multiply_float(step, sizes.softmax_scale), minus_sum, gain
        step, minus_sum, gain = (m.as_int(m.select(is_real, x, 0.0)) for x in numbers)
        is_first_lane = m.less(self.lane, 1)
        m.store(m.address(factors, m.left(place, 1)), [step, minus_sum], where=is_first_lane)
        m.store(m.address(noise, place), [gain], where=is_first_lane)
