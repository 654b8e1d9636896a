"""Exact attention of 4 query heads by each warp of a block, over a list of tokens in shared memory; for Hopper GPUs.

warp      32 tokens of the list at a time
          lane = token     exact logits, weights, terms of what was found (mosaic_found.py)
          lane = columns   values, one token after the other
block     the parts of its warps, added up by a warp for each query head
"""

import dataclasses
import functools
from typing import Any

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import HEADS, word_of
from pallas_kernels.mosaic_certificate import scale_of
from pallas_kernels.mosaic_certified_threshold import LIMITS, Rule
from pallas_kernels.mosaic_found import KINDS, Found, byte_of, sum_of_lanes
from pallas_kernels.mosaic_parts import LOWEST
from pallas_kernels.mosaic_rules import LANE_TOKENS, Given, load_limits
from pallas_kernels.mosaic_top_p_threshold import exp, warp_sum

LANES, WARPS = 32, 4
CHUNK = LANE_TOKENS * m.WARPGROUP
# Tokens whose values are under way at once; words of a key that are multiplied without a loop.
VALUES_AT_ONCE, KEY_WORDS = 8, 64


def _unpack(dtype: str, word):
    """The numbers of a word, as f32."""
    if dtype == "float32":
        return (m.as_float(word),)
    return (m.bfloat16_pair if dtype == "bfloat16" else m.float16_pair)(word)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """columns: of an output, D and what is missing to a multiple of `LARGEST_COLUMNS`; words: of a key or value."""

    kv_heads: int
    rows: int
    group: int
    groups: int
    tokens: int
    head_dim: int
    columns: int
    words: int
    dtype: str
    query_dtype: str
    blocks: int
    state_words: int
    sink: int
    softmax_scale: float
    rule: Rule

    @property
    def heads(self) -> int:
        return HEADS * self.groups

    @property
    def given(self) -> Given:
        return Given(deviations=self.rule.deviations, group=self.group)

    @property
    def lane_words(self) -> int:
        """Words of a value that a lane adds up."""
        return -(-self.words // LANES)

    @property
    def each(self) -> int:
        """Numbers of a word."""
        return self.head_dim // self.words

    @property
    def is_vector(self) -> bool:
        """Whether a lane's words are neighbours."""
        return self.words % LANES == 0 and self.lane_words in (1, 2, 4)

    # Places in shared memory, in words: queries [C,4], limits [4,LIMITS], a list, weights of each warp [32,4], the
    # rule's words [WORDS,H], tokens of each warp, a ticket, and parts of the warps: sums, peaks and totals, outputs.
    @property
    def limits_at(self) -> int:
        return HEADS * self.columns

    @property
    def list_at(self) -> int:
        return self.limits_at + HEADS * LIMITS

    @property
    def weights_at(self) -> int:
        return self.list_at + CHUNK

    @property
    def rule_at(self) -> int:
        return self.weights_at + WARPS * LANES * HEADS

    @property
    def totals_at(self) -> int:
        return self.rule_at + Given.WORDS * self.heads

    @property
    def ticket_at(self) -> int:
        return self.totals_at + WARPS

    @property
    def sums_at(self) -> int:
        return self.ticket_at + 4

    @property
    def peaks_at(self) -> int:
        return self.sums_at + WARPS * HEADS * KINDS

    @property
    def outs_at(self) -> int:
        return self.peaks_at + 2 * WARPS * HEADS

    @property
    def shared_words(self) -> int:
        return self.outs_at + WARPS * HEADS * self.columns


class Progress:
    """What a warp has of 4 query heads: peaks; totals of each lane; this lane's columns, and its sums."""

    def __init__(self, sizes: Sizes, flat):
        self.sizes = sizes
        self.peaks, self.totals, rest = flat[:HEADS], flat[HEADS : 2 * HEADS], flat[2 * HEADS :]
        self.columns, rest = rest[: -HEADS * KINDS], rest[-HEADS * KINDS :]
        self.sums = [rest[KINDS * h : KINDS * (h + 1)] for h in range(HEADS)]

    @classmethod
    def start(cls, sizes: Sizes) -> "Progress":
        zeros = HEADS * (1 + sizes.lane_words * sizes.each + KINDS)
        return cls(sizes, [m.value(LOWEST)] * HEADS + [m.value(0.0)] * zeros)

    @property
    def flat(self):
        return [*self.peaks, *self.totals, *self.columns, *(x for sums in self.sums for x in sums)]

    def raise_peak(self, h: int, highest, logit, is_listed):
        """A head's peak and all that is in its units; returns the weight of each lane's token, which it adds."""
        peak = m.maximum(self.peaks[h], highest)
        decay = exp(m.subtract_float(self.peaks[h], peak))
        weight = m.select(is_listed, exp(m.subtract_float(logit, peak)), 0.0)
        self.peaks[h], self.totals[h] = peak, m.fma(self.totals[h], decay, weight)
        size = self.sizes.lane_words * self.sizes.each
        for i in range(size * h, size * (h + 1)):
            self.columns[i] = m.multiply_float(self.columns[i], decay)
        return weight

    def add_terms(self, h: int, terms):
        self.sums[h] = [m.add_float(x, y) for x, y in zip(self.sums[h], terms, strict=True)]

    def of_words(self, h: int):
        """A head's numbers of each word."""
        each = self.sizes.each
        first = self.sizes.lane_words * h
        return [self.columns[each * (first + i) : each * (first + i + 1)] for i in range(self.sizes.lane_words)]


class WarpAttention:
    """A block's attention over tokens of a row, for 4 of its query heads."""

    def __init__(self, sizes: Sizes, lane, row, group, query, keys, values, bins, scale, scored, limits, shared):
        self.sizes, self.lane, self.row, self.scored = sizes, lane, row, scored
        self.warp = m.right(m.thread_index(), 5)
        self.head = m.add(m.multiply(group, HEADS), self.warp)
        self.is_real = m.less(self.head, sizes.group)
        self.query, self.keys, self.values, self.bins, self.scale = query, keys, values, bins, scale
        # Heads that are not real do what the last one does, and store nothing.
        real = m.minimum_signed(self.head, sizes.group - 1)
        self.own_limits = load_limits(limits, m.add(m.multiply(row, sizes.heads), real))
        self._shared = m.shared_address(shared)

    def shared(self, place, word: Any = 0):
        """Address of a word of shared memory, from a place on."""
        return m.add(self._shared, m.left(m.add(word, place), 2))

    def start(self):
        """What the warp has before its first token: numbers to be carried."""
        return Progress.start(self.sizes).flat

    def store_limits(self):
        """The limits of this warp's head, to shared memory."""
        at = self.shared(self.sizes.limits_at, m.multiply(self.warp, LIMITS))
        words = [m.as_int(x) for x in self.own_limits]

        def store():
            for i in range(0, LIMITS, 4):
                m.store_shared(at, words[i : i + 4], offset=4 * i)

        m.when(m.less(self.lane, 1), store)

    def store_queries(self):
        """Queries of the 4 heads as f32, zero past their end."""
        sizes = self.sizes
        each = 1 if sizes.query_dtype == "float32" else 2
        words = sizes.head_dim // each
        all_words = sizes.columns // each
        first_head = m.subtract(self.head, self.warp)

        def store(i, _):
            place = m.add(m.thread_index(), m.multiply(i, m.WARPGROUP))
            head = m.divide(place, all_words)
            word = m.subtract(place, m.multiply(head, all_words))
            is_real = m.both(m.less(m.add(first_head, head), sizes.group), m.less(word, words))
            row = m.add(m.multiply(self.row, sizes.group), m.minimum_signed(m.add(first_head, head), sizes.group - 1))
            at = m.address(self.query, m.add(m.multiply(row, words), m.minimum_signed(word, words - 1)))
            numbers = [m.as_int(m.select(is_real, x, 0.0)) for x in _unpack(sizes.query_dtype, m.load(at)[0])]

            def store_numbers():
                for j, number in enumerate(numbers):
                    dim = m.add(m.multiply(word, each), j)
                    m.store_shared(self.shared(0, m.add(m.multiply(dim, HEADS), head)), [number])

            m.when(m.less(place, HEADS * all_words), store_numbers)
            return []

        m.loop(-(-HEADS * all_words // m.WARPGROUP), [], store)

    def share(self, carried):
        """The warp's part, to shared memory."""
        state = Progress(self.sizes, carried)
        sizes, is_first_lane = self.sizes, m.less(self.lane, 1)
        for head in range(HEADS):
            place = m.add(m.multiply(self.warp, HEADS), head)
            total = warp_sum(state.totals[head], m.add_float)
            pair = [m.as_int(state.peaks[head]), m.as_int(total)]
            at = self.shared(sizes.peaks_at, m.left(place, 1))
            m.when(is_first_lane, functools.partial(m.store_shared, at, pair))
            at = self.shared(sizes.sums_at, m.add(m.multiply(place, KINDS), m.right(self.lane, 2)))
            total = [m.as_int(sum_of_lanes(self.lane, state.sums[head]))]
            m.when(m.less(m.bit_and(self.lane, 3), 1), functools.partial(m.store_shared, at, total))
            for word, numbers in zip(self._words(), state.of_words(head), strict=True):
                column = m.add(m.multiply(place, sizes.columns), m.multiply(word, sizes.each))
                store = functools.partial(m.store_shared, self.shared(sizes.outs_at, column), [*map(m.as_int, numbers)])
                m.when(m.less(word, sizes.words), store)

    def add_up_warps(self, peaks, totals, outs, sums):
        """The parts of all warps of one query head, by one of them."""
        sizes = self.sizes
        place = m.add(m.multiply(m.block_index(), HEADS), self.warp)
        mine = [m.add(self.warp, HEADS * warp) for warp in range(WARPS)]
        pairs = [m.load_shared(self.shared(sizes.peaks_at, m.left(one, 1)), words=2) for one in mine]
        parts = [m.as_float(peak) for peak, _ in pairs]
        peak = functools.reduce(m.maximum, parts)
        weights = [exp(m.subtract_float(part, peak)) for part in parts]
        total = [m.multiply_float(m.as_float(total), weight) for (_, total), weight in zip(pairs, weights, strict=True)]
        is_first_lane = m.less(self.lane, 1)
        m.store(m.address(peaks, place), [m.as_int(peak)], where=is_first_lane)
        total = functools.reduce(m.add_float, total)
        m.store(m.address(totals, place), [m.as_int(total)], where=is_first_lane)
        kind = m.bit_and(self.lane, KINDS - 1)
        found = [m.load_shared(self.shared(sizes.sums_at, m.add(m.multiply(one, KINDS), kind)))[0] for one in mine]
        found = functools.reduce(m.add_float, map(m.as_float, found))
        at = m.address(sums, m.add(m.multiply(place, KINDS), kind))
        m.store(at, [m.as_int(found)], where=m.less(self.lane, KINDS))
        for first in range(0, sizes.columns, LANES):
            column = m.add(self.lane, first)
            values = [
                m.load_shared(self.shared(sizes.outs_at, m.add(m.multiply(one, sizes.columns), column)))[0]
                for one in mine
            ]
            value = [m.multiply_float(m.as_float(x), weight) for x, weight in zip(values, weights, strict=True)]
            value = functools.reduce(m.add_float, value)
            m.store(m.address(outs, m.add(m.multiply(place, sizes.columns), column)), [m.as_int(value)])

    def _words(self):
        """Which words of a value this lane adds up."""
        sizes = self.sizes
        if sizes.is_vector:
            return [m.add(m.multiply(self.lane, sizes.lane_words), i) for i in range(sizes.lane_words)]
        return [m.add(self.lane, LANES * i) for i in range(sizes.lane_words)]

    def attend(self, count, carried):
        """With the tokens of the list, so many of them: every fourth 32 are this warp's."""
        batches = m.right(m.add(count, LANES - 1), 5)
        mine = m.right(m.add(m.subtract(batches, m.minimum_signed(self.warp, batches)), WARPS - 1), 2)
        return m.loop(mine, carried, lambda i, flat: self._attend_batch(i, count, Progress(self.sizes, flat)).flat)

    def _attend_batch(self, i, count, state: Progress) -> Progress:
        sizes = self.sizes
        first = m.multiply(m.add(m.multiply(i, WARPS), self.warp), LANES)
        place = m.add(first, self.lane)
        is_listed = m.both(m.less(place, count), m.less(first, count))
        token = m.load_shared(self.shared(sizes.list_at, m.minimum_signed(place, m.subtract(count, 1))))[0]
        index = m.add(m.multiply(self.row, sizes.tokens), token)
        scale = scale_of(m.load(m.address(self.scale, m.right(index, 1)))[0], index)
        is_scored = m.both(is_listed, m.less(m.subtract(token, sizes.sink), self.scored))
        first_head = m.subtract(self.head, self.warp)
        heads = [m.minimum_signed(m.add(first_head, h), sizes.group - 1) for h in range(HEADS)]
        words = [
            m.load(m.address(self.bins, word_of(self.row, token, head, sizes.group, sizes.tokens)))[0] for head in heads
        ]
        logits = self._dots(index)
        weights = []
        for h, logit in enumerate(logits):
            # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
            logit = m.select(m.less_float(logit, -3.4e38), float("nan"), logit)
            highest = warp_sum(m.select(is_listed, logit, LOWEST), m.maximum)
            weights.append(state.raise_peak(h, highest, logit, is_listed))
            found = Found(sizes.rule, self._load_limits(h))
            bin_ = byte_of(words[h], token)
            is_found = m.both(is_scored, m.less(bin_, found.kept(scale)))
            is_own = m.either(is_found, m.both(is_listed, m.negate(is_scored)))
            state.add_terms(h, found.masses(logit, is_listed, is_own) + found.terms(logit, bin_, scale, is_found))
        at = self.shared(sizes.weights_at, m.multiply(m.thread_index(), HEADS))
        m.store_shared(at, [m.as_int(weight) for weight in weights])
        m.warp_barrier()
        listed = m.maximum_signed(m.minimum_signed(m.subtract(count, first), LANES), 0)
        state.columns = self._add_values(first, count, listed, state.columns)
        m.warp_barrier()
        return state

    def _load_limits(self, h: int):
        at = self.shared(self.sizes.limits_at)
        return [
            m.as_float(x) for i in range(0, LIMITS, 4) for x in m.load_shared(at, words=4, offset=4 * (LIMITS * h + i))
        ]

    def _dots(self, index):
        """Logits of the 4 queries and each lane's key, of [R T]."""
        sizes = self.sizes
        vector = next(n for n in (4, 2, 1) if sizes.words % n == 0)
        at_once = KEY_WORDS if sizes.words % KEY_WORDS == 0 else sizes.words
        at = m.row_address(self.keys, index, sizes.words)
        query = self.shared(0)

        def add(i, products):
            key = m.advance(at, m.multiply(i, at_once))
            mine = m.add(query, m.multiply(i, 4 * HEADS * at_once * sizes.each))
            words = [w for j in range(0, at_once, vector) for w in m.load(key, words=vector, offset=4 * j)]
            for j, number in enumerate(x for w in words for x in _unpack(sizes.dtype, w)):
                four = m.load_shared(mine, words=HEADS, offset=4 * HEADS * j)
                products = [m.fma(number, m.as_float(q), x) for q, x in zip(four, products, strict=True)]
            return products

        products = m.loop(sizes.words // at_once, [m.value(0.0)] * HEADS, add)
        return [m.multiply_float(x, sizes.softmax_scale) for x in products]

    def _add_values(self, first, count, listed, columns):
        """Columns of the 4 heads with the values of the list's tokens from `first` on, `listed` of them."""
        sizes = self.sizes
        words = [m.minimum_signed(word, sizes.words - 1) for word in self._words()]
        first_token = m.multiply(self.row, sizes.tokens)
        weights_at = self.shared(sizes.weights_at, m.multiply(self.warp, LANES * HEADS))

        def load(place):
            token = m.load_shared(self.shared(sizes.list_at, m.minimum_signed(place, m.subtract(count, 1))))[0]
            at = m.row_address(self.values, m.add(first_token, token), sizes.words)
            if sizes.is_vector:
                return m.load(m.advance(at, words[0]), words=sizes.lane_words)
            return [m.load(m.advance(at, word))[0] for word in words]

        def add(i, columns):
            mine = [m.add(m.multiply(i, VALUES_AT_ONCE), j) for j in range(VALUES_AT_ONCE)]
            loads = [load(m.add(first, one)) for one in mine]
            for one, value in zip(mine, loads, strict=True):
                weights = m.load_shared(m.add(weights_at, m.left(one, 4)), words=HEADS)
                # What is not listed has no weight, and is not looked at.
                numbers = [m.select(m.less(one, listed), x, 0.0) for word in value for x in _unpack(sizes.dtype, word)]
                pairs = [(m.as_float(weight), x) for weight in weights for x in numbers]
                columns = [m.fma(*pair, column) for pair, column in zip(pairs, columns, strict=True)]
            return columns

        return m.loop(m.divide(m.add(listed, VALUES_AT_ONCE - 1), VALUES_AT_ONCE), columns, add)
