"""The second round in one launch, for Hopper GPUs: kv heads of which a query head is short attend by lower limits.

    block     an equal share of the chunks of 2,048 tokens of a kv head that is short, for 4 of its query heads
              chunk: bytes -> bits of the tokens that are attended -> their list, in shared memory
    warp      32 tokens of the list at a time
              lane = token     exact logits, weights, terms of what was found (mosaic_found.py)
              lane = columns   values, one token after the other
    last block of a kv head    outputs and sums of its parts added up; certificates

Where no head is short, blocks end after a look at the marks. Where few are, all blocks share what there is to do.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import HEADS, State, word_of
from pallas_kernels.mosaic_certificate import certify, load_sample, scale_of, store_numbers, typical_deviation
from pallas_kernels.mosaic_certified_threshold import LIMITS, Rule
from pallas_kernels.mosaic_found import KINDS, Found, byte_of, sum_of_lanes
from pallas_kernels.mosaic_parts import LARGEST_COLUMNS, LOWEST, Parts, columns_of
from pallas_kernels.mosaic_rules import (
    LANE_TOKENS,
    Given,
    attended_tokens,
    comparisons,
    load_limits,
    load_words,
)
from pallas_kernels.mosaic_top_p_threshold import exp, warp_sum
from pallas_kernels.mosaic_verify import sum_of_parts

LANES, WARPS = 32, 4
CHUNK = LANE_TOKENS * m.WARPGROUP
# Blocks that are on the device at once, and the most that a kv head's tokens are split into.
BLOCKS, LARGEST_PARTS = 264, 64
# Tokens whose values are under way at once; words of a key that are multiplied without a loop.
VALUES_AT_ONCE, KEY_WORDS = 8, 64


def takes(head_dim: int, dtype) -> bool:
    """Whether `extend` takes keys and values of so many dimensions and this type."""
    return head_dim * jnp.dtype(dtype).itemsize % 4 == 0 and jnp.dtype(dtype).name in ("bfloat16", "float16", "float32")


def extend(
    query, keys, values, bins, scale, quantized, length, limits, state, out, summary,
    *, sink: int, softmax_scale: float, rule: Rule,
):  # fmt: skip
    """Attend by limits of a second round, in kv heads of which a query head is short.

    Args:
      query: [B,K,G,D]; keys, values: [B,K,T,D], bfloat16, float16 or float32.
      bins, scale, quantized: as in `mosaic_verify.verify`; length: int32 [B].
      limits: float32 [B,K,H,LIMITS], of `verify`.
      state: a reference, int32 [B,K,Z], as `verify` leaves it; the kernel takes tickets there.
      out, summary: references, float32 [B,K,G,D] and [B,K,G,8], of `verify`; those of kv heads that attend anew are
        written.

    Raises:
      NotImplementedError: `takes` is False.
    """
    batch, kv_heads, tokens, head_dim = keys.shape
    if not takes(head_dim, keys.dtype):
        raise NotImplementedError(
            f"the kernel takes bfloat16, float16 and float32, rows of whole words, got {keys.dtype} of {head_dim}"
        )
    rows, group, heads = batch * kv_heads, query.shape[2], limits.shape[2]
    groups = heads // HEADS
    sizes = _Sizes(
        kv_heads=kv_heads, rows=rows, group=group, groups=groups, tokens=tokens, head_dim=head_dim,
        columns=-(-head_dim // LARGEST_COLUMNS) * LARGEST_COLUMNS, words=head_dim * keys.dtype.itemsize // 4,
        dtype=keys.dtype.name, query_dtype=query.dtype.name, blocks=max(BLOCKS, rows * groups),
        state_words=state.shape[-1], sink=sink, softmax_scale=softmax_scale, rule=rule,
    )  # fmt: skip
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    m.call(
        functools.partial(_kernel, sizes),
        name="extend",
        out_type=(
            f32((sizes.blocks, HEADS)),
            f32((sizes.blocks, HEADS)),
            f32((sizes.blocks, HEADS, sizes.columns)),
            f32((sizes.blocks, HEADS, KINDS)),
            jax.ShapeDtypeStruct((sizes.blocks,), jnp.int32),
        ),
        blocks=sizes.blocks,
        shared_words=sizes.shared_words,
    )(query, keys, values, bins, scale, quantized, length, limits, state, out, summary)


def _unpack(dtype: str, word):
    """The numbers of a word, as f32."""
    if dtype == "float32":
        return (m.as_float(word),)
    return (m.bfloat16_pair if dtype == "bfloat16" else m.float16_pair)(word)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
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


def _kernel(
    sizes: _Sizes, query, keys, values, bins, scale, quantized, length, limits, state, out, summary, peaks, totals,
    outs, sums, tokens, shared,
):  # fmt: skip
    """query [R,G,D], keys and values [R,T,D], bins [R,T/8,G,2], scale [R,T], quantized and length [B], limits
    [R,H,LIMITS]; state [R,Z], out [R,G,D] and summary [R,G,8], written to; of N blocks peaks and totals [N,4], outs
    [N,4,C], sums [N,4,KINDS], tokens [N]; shared memory: see `_Sizes`."""
    lane = m.bit_and(m.thread_index(), LANES - 1)
    number = _count_short(sizes, lane, state)

    def share_out():
        items = m.multiply(number, sizes.groups)
        parts = m.minimum_signed(m.divide(sizes.blocks, items), LARGEST_PARTS)
        item = m.divide(m.block_index(), parts)

        def run():
            some = m.divide(item, sizes.groups)
            group = m.subtract(item, m.multiply(some, sizes.groups))
            first = m.multiply(item, parts)
            arrays = query, keys, values, bins, scale, quantized, length, limits, state, out, summary
            block = _Block(sizes, lane, _short_row(sizes, lane, state, some), group, first, parts, *arrays, shared)
            block.attend(peaks, totals, outs, sums, tokens)
            m.when(block.is_last(), lambda: block.conclude(peaks, totals, outs, sums, tokens))

        m.when(m.less(item, items), run)

    m.when(m.less(0, number), share_out)


def _marks(sizes: _Sizes, lane, state, i):
    """Bits of 32 rows, of those of which a head is short."""
    row = m.add(m.multiply(i, 32), lane)
    mark = m.load(State(state, m.minimum_signed(row, sizes.rows - 1), sizes.heads, sizes.state_words).short())[0]
    return m.ballot(m.both(m.less(row, sizes.rows), m.less(0, mark)))


def _count_short(sizes: _Sizes, lane, state):
    """How many rows are short."""

    def add(i, carried):
        return [m.add(carried[0], m.count_ones(_marks(sizes, lane, state, i)))]

    return m.loop(-(-sizes.rows // 32), [m.value(0)], add)[0]


def _short_row(sizes: _Sizes, lane, state, number):
    """The row that is short after so many others."""

    def look(i, carried):
        before, row = carried
        marks = _marks(sizes, lane, state, i)
        mine = m.add(before, m.count_ones(m.bit_and(marks, m.subtract(m.left(1, lane), 1))))
        is_marked = m.less(0, m.bit_and(marks, m.left(1, lane)))
        is_it = m.both(is_marked, m.both(m.not_less(mine, number), m.not_less(number, mine)))
        row = m.select(is_it, m.add(m.multiply(i, 32), lane), row)
        return [m.add(before, m.count_ones(marks)), row]

    _, row = m.loop(-(-sizes.rows // 32), [m.value(0), m.value(0)], look)
    return warp_sum(row, m.add)


class _State:
    """What a warp has of 4 query heads: peaks; totals of each lane; this lane's columns, and its sums."""

    def __init__(self, sizes: _Sizes, flat):
        self.sizes = sizes
        self.peaks, self.totals, rest = flat[:HEADS], flat[HEADS : 2 * HEADS], flat[2 * HEADS :]
        self.columns, rest = rest[: -HEADS * KINDS], rest[-HEADS * KINDS :]
        self.sums = [rest[KINDS * h : KINDS * (h + 1)] for h in range(HEADS)]

    @classmethod
    def start(cls, sizes: _Sizes) -> "_State":
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


class _Block:
    """A block's part of a kv head's tokens, for 4 of its query heads."""

    def __init__(
        self, sizes: _Sizes, lane, row, group, first, parts, query, keys, values, bins, scale, quantized, length,
        limits, state, out, summary, shared,
    ):  # fmt: skip
        self.sizes, self.lane, self.row, self.first, self.parts = sizes, lane, row, first, parts
        self.warp = m.right(m.thread_index(), 5)
        self.head = m.add(m.multiply(group, HEADS), self.warp)
        self.is_real = m.less(self.head, sizes.group)
        self.query, self.keys, self.values, self.bins, self.scale = query, keys, values, bins, scale
        sequence = m.divide(row, sizes.kv_heads)
        self.quantized, self.length = (m.load(m.address(x, sequence))[0] for x in (quantized, length))
        self.scored = m.maximum_signed(m.subtract(self.quantized, sizes.sink), 0)
        self.limits, self.out, self.summary = limits, out, summary
        # Heads that are not real do what the last one does, and store nothing.
        real = m.minimum_signed(self.head, sizes.group - 1)
        self.own_limits = load_limits(limits, m.add(m.multiply(row, sizes.heads), real))
        # Behind those that `mosaic_verify` takes.
        self.ticket = State(state, row, sizes.heads, sizes.state_words).ticket(m.add(group, sizes.heads))
        self.shared = m.shared_address(shared)

    def _shared(self, place, word: Any = 0):
        """Address of a word of shared memory, from a place on."""
        return m.add(self.shared, m.left(m.add(word, place), 2))

    def attend(self, peaks, totals, outs, sums, tokens):
        """The block's part, to its place in the arrays."""
        sizes = self.sizes
        self._store_queries()
        self._store_limits()
        m.barrier()
        compare = comparisons(
            [m.load_shared(self._shared(sizes.rule_at), offset=4 * head)[0] for head in range(sizes.group)]
        )
        part = m.subtract(m.block_index(), self.first)
        chunks = m.divide(m.add(self.length, CHUNK - 1), CHUNK)
        start = m.minimum_signed(part, chunks)
        rounds = m.divide(m.add(m.subtract(chunks, start), m.subtract(self.parts, 1)), self.parts)

        def attend_chunk(i, carried):
            chunk = m.add(part, m.multiply(i, self.parts))
            count = self._list(m.multiply(chunk, CHUNK), compare)
            batches = m.right(m.add(count, LANES - 1), 5)
            mine = m.right(m.add(m.subtract(batches, m.minimum_signed(self.warp, batches)), WARPS - 1), 2)
            *state, total = carried
            state = m.loop(mine, state, lambda i, state: self._attend_batch(i, count, _State(sizes, state)).flat)
            # The list makes way for the next one.
            m.barrier()
            return [*state, m.add(total, count)]

        *flat, total = m.loop(rounds, [*_State.start(sizes).flat, m.value(0)], attend_chunk)
        m.store(m.address(tokens, m.block_index()), [total], where=m.less(m.thread_index(), 1))
        self._share(_State(sizes, flat))
        m.barrier()
        self._add_up_warps(peaks, totals, outs, sums)

    def _share(self, state: "_State"):
        """The warp's part, to shared memory."""
        sizes, is_first_lane = self.sizes, m.less(self.lane, 1)
        for head in range(HEADS):
            place = m.add(m.multiply(self.warp, HEADS), head)
            total = warp_sum(state.totals[head], m.add_float)
            pair = [m.as_int(state.peaks[head]), m.as_int(total)]
            at = self._shared(sizes.peaks_at, m.left(place, 1))
            m.when(is_first_lane, functools.partial(m.store_shared, at, pair))
            at = self._shared(sizes.sums_at, m.add(m.multiply(place, KINDS), m.right(self.lane, 2)))
            total = [m.as_int(sum_of_lanes(self.lane, state.sums[head]))]
            m.when(m.less(m.bit_and(self.lane, 3), 1), functools.partial(m.store_shared, at, total))
            for word, numbers in zip(self._words(), state.of_words(head), strict=True):
                column = m.add(m.multiply(place, sizes.columns), m.multiply(word, sizes.each))
                store = functools.partial(
                    m.store_shared, self._shared(sizes.outs_at, column), [*map(m.as_int, numbers)]
                )
                m.when(m.less(word, sizes.words), store)

    def _add_up_warps(self, peaks, totals, outs, sums):
        """The parts of all warps of one query head, by one of them."""
        sizes = self.sizes
        place = m.add(m.multiply(m.block_index(), HEADS), self.warp)
        mine = [m.add(self.warp, HEADS * warp) for warp in range(WARPS)]
        pairs = [m.load_shared(self._shared(sizes.peaks_at, m.left(one, 1)), words=2) for one in mine]
        parts = [m.as_float(peak) for peak, _ in pairs]
        peak = functools.reduce(m.maximum, parts)
        weights = [exp(m.subtract_float(part, peak)) for part in parts]
        total = [m.multiply_float(m.as_float(total), weight) for (_, total), weight in zip(pairs, weights, strict=True)]
        is_first_lane = m.less(self.lane, 1)
        m.store(m.address(peaks, place), [m.as_int(peak)], where=is_first_lane)
        total = functools.reduce(m.add_float, total)
        m.store(m.address(totals, place), [m.as_int(total)], where=is_first_lane)
        kind = m.bit_and(self.lane, KINDS - 1)
        found = [m.load_shared(self._shared(sizes.sums_at, m.add(m.multiply(one, KINDS), kind)))[0] for one in mine]
        found = functools.reduce(m.add_float, map(m.as_float, found))
        at = m.address(sums, m.add(m.multiply(place, KINDS), kind))
        m.store(at, [m.as_int(found)], where=m.less(self.lane, KINDS))
        for first in range(0, sizes.columns, LANES):
            column = m.add(self.lane, first)
            values = [
                m.load_shared(self._shared(sizes.outs_at, m.add(m.multiply(one, sizes.columns), column)))[0]
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

    def _store_queries(self):
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
                    m.store_shared(self._shared(0, m.add(m.multiply(dim, HEADS), head)), [number])

            m.when(m.less(place, HEADS * all_words), store_numbers)
            return []

        m.loop(-(-HEADS * all_words // m.WARPGROUP), [], store)

    def _store_limits(self):
        """What each head keeps; and the limits of this warp's."""
        sizes, head = self.sizes, m.thread_index()

        def store():
            words = sizes.given.words(load_limits(self.limits, m.add(m.multiply(self.row, sizes.heads), head)))
            for i, word in enumerate(words):
                m.store_shared(self._shared(sizes.rule_at, m.add(head, sizes.heads * i)), [word])

        m.when(m.less(head, sizes.group), store)
        at = self._shared(sizes.limits_at, m.multiply(self.warp, LIMITS))
        words = [m.as_int(x) for x in self.own_limits]

        def store_own():
            for i in range(0, LIMITS, 4):
                m.store_shared(at, words[i : i + 4], offset=4 * i)

        m.when(m.less(self.lane, 1), store_own)

    def _list(self, start, compare):
        """List a chunk's tokens that are attended, in shared memory; returns how many."""
        sizes = self.sizes
        token = m.add(start, m.multiply(m.thread_index(), LANE_TOKENS))
        words = load_words(self.bins, self.row, token, sizes.group, sizes.tokens)
        mask = attended_tokens(
            sizes.given, compare, words, (self.limits, self.scale), self.row, token, self._shared(sizes.rule_at),
            heads=sizes.heads, tokens=sizes.tokens, sink=sizes.sink, quantized=self.quantized, length=self.length,
        )  # fmt: skip
        count = m.count_ones(mask)
        through = count
        for lanes in (1, 2, 4, 8, 16):
            through = m.select(m.less(self.lane, lanes), through, m.add(through, m.shuffle_up(through, lanes)))
        at = self._shared(sizes.totals_at, self.warp)
        m.when(m.not_less(self.lane, LANES - 1), lambda: m.store_shared(at, [through]))
        m.barrier()
        of_warps = [m.load_shared(self._shared(sizes.totals_at), offset=4 * i)[0] for i in range(WARPS)]
        place = m.subtract(through, count)
        for i, more in enumerate(of_warps):
            place = m.select(m.less(i, self.warp), m.add(place, more), place)

        def store(i, carried):
            (rest,) = carried
            lowest = m.bit_and(rest, m.subtract(0, rest))
            at = self._shared(sizes.list_at, m.add(place, i))
            number = m.add(token, m.count_ones(m.subtract(lowest, 1)))
            m.when(m.less(0, rest), lambda: m.store_shared(at, [number]))
            return [m.bit_xor(rest, lowest)]

        m.loop(count, [mask], store)
        m.barrier()
        return functools.reduce(m.add, of_warps)

    def _attend_batch(self, i, count, state: "_State") -> "_State":
        """With 32 tokens of the list more: every fourth such batch is this warp's."""
        sizes = self.sizes
        first = m.multiply(m.add(m.multiply(i, WARPS), self.warp), LANES)
        place = m.add(first, self.lane)
        is_listed = m.both(m.less(place, count), m.less(first, count))
        token = m.load_shared(self._shared(sizes.list_at, m.minimum_signed(place, m.subtract(count, 1))))[0]
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
        at = self._shared(sizes.weights_at, m.multiply(m.thread_index(), HEADS))
        m.store_shared(at, [m.as_int(weight) for weight in weights])
        m.warp_barrier()
        listed = m.maximum_signed(m.minimum_signed(m.subtract(count, first), LANES), 0)
        state.columns = self._add_values(first, count, listed, state.columns)
        m.warp_barrier()
        return state

    def _load_limits(self, h: int):
        at = self._shared(self.sizes.limits_at)
        return [
            m.as_float(x) for i in range(0, LIMITS, 4) for x in m.load_shared(at, words=4, offset=4 * (LIMITS * h + i))
        ]

    def _dots(self, index):
        """Logits of the 4 queries and each lane's key, of [R T]."""
        sizes = self.sizes
        vector = next(n for n in (4, 2, 1) if sizes.words % n == 0)
        at_once = KEY_WORDS if sizes.words % KEY_WORDS == 0 else sizes.words
        at = m.row_address(self.keys, index, sizes.words)
        query = self._shared(0)

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
        weights_at = self._shared(sizes.weights_at, m.multiply(self.warp, LANES * HEADS))

        def load(place):
            token = m.load_shared(self._shared(sizes.list_at, m.minimum_signed(place, m.subtract(count, 1))))[0]
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

    def is_last(self):
        """Whether all other blocks of the kv head and these query heads are done."""
        m.barrier()
        at, is_first_thread = self._shared(self.sizes.ticket_at), m.less(m.thread_index(), 1)
        m.when(is_first_thread, lambda: m.store_shared(at, [m.take_ticket(self.ticket)]))
        m.barrier()
        return m.not_less(m.load_shared(at)[0], m.subtract(self.parts, 1))

    def conclude(self, peaks, totals, outs, sums, tokens):
        """Output and summary of each real head, from all parts."""
        m.when(self.is_real, lambda: self._conclude(peaks, totals, outs, sums, tokens))

    def _conclude(self, peaks, totals, outs, sums, tokens):
        sizes = self.sizes
        parts = Parts(
            peaks, totals, outs, heads=HEADS, columns=sizes.columns, head=self.warp, first=self.first,
            number=self.parts, usual=LARGEST_PARTS, lane=self.lane,
        )  # fmt: skip
        place = m.add(m.multiply(self.row, sizes.group), self.head)
        for column in range(0, sizes.columns, columns_of(LARGEST_PARTS)):
            parts.store(m.value(column), self.out, m.multiply(place, sizes.head_dim), sizes.head_dim)
        first_sum = m.multiply(m.add(m.multiply(self.first, HEADS), self.warp), KINDS)
        found = sum_of_parts(self.lane, sums, first_sum, self.parts, LARGEST_PARTS)
        first_token = m.multiply(self.row, sizes.tokens)
        sample = load_sample(self.lane, self.scale, first_token, self.scored, sink=sizes.sink, tokens=sizes.tokens)
        deviation = typical_deviation(sizes.rule, sample, self.own_limits[0])
        certificate = certify(sizes.rule, found, self.own_limits, self.scored, deviation)
        count = m.value(0)
        for i in range(0, LARGEST_PARTS, LANES):
            part = m.add(self.lane, i)
            at = m.address(tokens, m.add(self.first, m.minimum_signed(part, m.subtract(self.parts, 1))))
            count = m.add(count, m.select(m.less(part, self.parts), m.load_written(at)[0], 0))
        numbers = [*certificate, found[-1], m.to_float(warp_sum(count, m.add))]
        m.when(m.less(self.lane, 1), lambda: store_numbers(numbers, self.summary, place))
