"""The second round in one launch, for Hopper GPUs: kv heads of which a query head is short attend by lower limits.

    block     an equal share of the chunks of 2,048 tokens of a kv head that is short, for 4 of its query heads
              chunk: bytes -> bits of the tokens that are attended -> their list, in shared memory
    warp      a query head, 32 tokens of the list at a time
              lane = token     exact logit, weight, terms of what was found (mosaic_found.py)
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
from pallas_kernels.mosaic_certificate import certify, scale_of, store_numbers, typical_deviation
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.mosaic_found import KINDS, Found, store_sums
from pallas_kernels.mosaic_parts import COLUMNS, LOWEST, Parts
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
BLOCKS, LARGEST_PARTS = 528, 64
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
        columns=-(-head_dim // COLUMNS) * COLUMNS, words=head_dim * keys.dtype.itemsize // 4, dtype=keys.dtype.name,
        query_dtype=query.dtype.name, blocks=max(BLOCKS, rows * groups), state_words=state.shape[-1], sink=sink,
        softmax_scale=softmax_scale, rule=rule,
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
    """columns: of an output, D and what is missing to a multiple of `COLUMNS`; words: of a key or value."""

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

    # Places in shared memory, in words: queries [4,C], list, the rule's words [WORDS,H], tokens of each warp, a ticket.
    @property
    def list_at(self) -> int:
        return HEADS * self.columns

    @property
    def rule_at(self) -> int:
        return self.list_at + CHUNK

    @property
    def totals_at(self) -> int:
        return self.rule_at + Given.WORDS * self.heads

    @property
    def ticket_at(self) -> int:
        return self.totals_at + WARPS

    @property
    def shared_words(self) -> int:
        return self.ticket_at + 4


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
        self.found = Found(sizes.rule, self.own_limits)
        self.real_head = real
        # Behind those that `mosaic_verify` takes.
        self.ticket = State(state, row, sizes.heads, sizes.state_words).ticket(m.add(group, sizes.groups))
        self.shared = m.shared_address(shared)

    def _shared(self, place, word: Any = 0):
        """Address of a word of shared memory, from a place on."""
        return m.add(self.shared, m.left(m.add(word, place), 2))

    def attend(self, peaks, totals, outs, sums, tokens):
        """The block's part, to its place in the arrays."""
        sizes = self.sizes
        self._store_queries()
        self._store_rule()
        m.barrier()
        compare = comparisons(
            [m.load_shared(self._shared(sizes.rule_at), offset=4 * head)[0] for head in range(sizes.group)]
        )
        part = m.subtract(m.block_index(), self.first)
        chunks = m.divide(m.add(self.length, CHUNK - 1), CHUNK)
        start = m.minimum_signed(part, chunks)
        rounds = m.divide(m.add(m.subtract(chunks, start), m.subtract(self.parts, 1)), self.parts)
        # The last is how many tokens there are.
        lane_words = -(-sizes.words // LANES)
        columns = lane_words * (2 if sizes.dtype != "float32" else 1)
        state = [m.value(LOWEST), m.value(0.0), *[m.value(0.0)] * (columns + KINDS), m.value(0)]

        def attend_chunk(i, state):
            chunk = m.add(part, m.multiply(i, self.parts))
            count = self._list(m.multiply(chunk, CHUNK), compare)
            batches = m.right(m.add(count, LANES - 1), 5)
            *state, total = state
            state = m.loop(batches, state, lambda batch, state: self._attend_batch(batch, count, state))
            # The list makes way for the next one.
            m.barrier()
            return [*state, m.add(total, count)]

        peak, total, *rest = m.loop(rounds, state, attend_chunk)
        place = m.add(m.multiply(m.block_index(), HEADS), self.warp)
        is_first_lane = m.less(self.lane, 1)
        m.store(m.address(peaks, place), [m.as_int(peak)], where=is_first_lane)
        m.store(m.address(totals, place), [m.as_int(warp_sum(total, m.add_float))], where=is_first_lane)
        store_sums(self.lane, rest[columns:-1], sums, m.multiply(place, KINDS))
        each = columns // lane_words
        for i in range(lane_words):
            word = m.add(self.lane, LANES * i)
            at = m.address(outs, m.add(m.multiply(place, sizes.columns), m.multiply(word, each)))
            mine = [m.as_int(x) for x in rest[each * i : each * (i + 1)]]
            m.store(at, mine, where=m.less(word, sizes.words))
        m.store(m.address(tokens, m.block_index()), [rest[-1]], where=m.less(m.thread_index(), 1))

    def _store_queries(self):
        """Queries of the 4 heads as f32, zero past their end."""
        sizes = self.sizes
        each = 1 if sizes.query_dtype == "float32" else 2
        words = sizes.head_dim // each
        first_head = m.subtract(self.head, self.warp)

        def store(i, _):
            place = m.add(m.thread_index(), m.multiply(i, m.WARPGROUP))
            head = m.divide(place, sizes.columns // each)
            word = m.subtract(place, m.multiply(head, sizes.columns // each))
            is_real = m.both(m.less(m.add(first_head, head), sizes.group), m.less(word, words))
            real_head = m.minimum_signed(m.add(first_head, head), sizes.group - 1)
            row = m.add(m.multiply(self.row, sizes.group), real_head)
            at = m.address(self.query, m.add(m.multiply(row, words), m.minimum_signed(word, words - 1)))
            numbers = [m.as_int(m.select(is_real, x, 0.0)) for x in _unpack(sizes.query_dtype, m.load(at)[0])]
            inside = m.less(place, HEADS * sizes.columns // each)
            m.when(inside, lambda: m.store_shared(self._shared(0, m.multiply(place, each)), numbers))
            return []

        m.loop(-(-HEADS * sizes.columns // (each * m.WARPGROUP)), [], store)

    def _store_rule(self):
        """What each head keeps."""
        sizes, head = self.sizes, m.thread_index()

        def store():
            words = sizes.given.words(load_limits(self.limits, m.add(m.multiply(self.row, sizes.heads), head)))
            for i, word in enumerate(words):
                m.store_shared(self._shared(sizes.rule_at, m.add(head, sizes.heads * i)), [word])

        m.when(m.less(head, sizes.group), store)

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

    def _attend_batch(self, batch, count, state):
        """32 tokens of the list: peak, total, columns and sums with them."""
        sizes = self.sizes
        peak, total, *rest = state
        columns, sums = rest[:-KINDS], rest[-KINDS:]
        first = m.multiply(batch, LANES)
        place = m.add(first, self.lane)
        is_listed = m.less(place, count)
        place = m.minimum_signed(place, m.subtract(count, 1))
        token = m.load_shared(self._shared(sizes.list_at, place))[0]
        index = m.add(m.multiply(self.row, sizes.tokens), token)
        word = m.load(m.address(self.bins, word_of(self.row, token, self.real_head, sizes.group, sizes.tokens)))[0]
        scale = scale_of(m.load(m.address(self.scale, m.right(index, 1)))[0], index)
        logit = m.multiply_float(self._dot(index), sizes.softmax_scale)
        # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
        logit = m.select(m.less_float(logit, -3.4e38), float("nan"), logit)
        is_scored = m.less(m.subtract(token, sizes.sink), self.scored)
        terms = self.found.terms(token, logit, word, scale, is_listed, is_scored)
        sums = [m.add_float(x, y) for x, y in zip(sums, terms, strict=True)]

        highest = warp_sum(m.select(is_listed, logit, LOWEST), m.maximum)
        new_peak = m.maximum(peak, highest)
        decay = exp(m.subtract_float(peak, new_peak))
        weight = m.select(is_listed, exp(m.subtract_float(logit, new_peak)), 0.0)
        columns = self._add_values(
            token, weight, m.subtract(count, first), [m.multiply_float(x, decay) for x in columns]
        )
        return [new_peak, m.fma(total, decay, weight), *columns, *sums]

    def _dot(self, index):
        """Product of this warp's query with each lane's key, [R T] of them."""
        sizes = self.sizes
        vector = next(n for n in (4, 2, 1) if sizes.words % n == 0)
        at_once = KEY_WORDS if sizes.words % KEY_WORDS == 0 else sizes.words
        at = m.row_address(self.keys, index, sizes.words)
        each = sizes.head_dim // sizes.words
        query = self._shared(0, m.multiply(self.warp, sizes.columns))

        def add(i, products):
            key = m.advance(at, m.multiply(i, at_once))
            mine = m.add(query, m.left(m.multiply(i, at_once * each), 2))
            words = [w for j in range(0, at_once, vector) for w in m.load(key, words=vector, offset=4 * j)]
            numbers = [x for w in words for x in _unpack(sizes.dtype, w)]
            products = list(products)
            step = next(n for n in (4, 2, 1) if len(numbers) % n == 0)
            for j in range(0, len(numbers), step):
                for k, word in enumerate(m.load_shared(mine, words=step, offset=4 * j)):
                    # Four sums, so that one need not wait for the other.
                    products[(j + k) % 4] = m.fma(numbers[j + k], m.as_float(word), products[(j + k) % 4])
            return products

        products = m.loop(sizes.words // at_once, [m.value(0.0)] * 4, add)
        return m.add_float(m.add_float(*products[:2]), m.add_float(*products[2:]))

    def _add_values(self, token, weight, count, columns):
        """The columns of this lane with the values of up to 32 tokens, one a lane, `count` of them listed."""
        sizes = self.sizes
        lane_words = -(-sizes.words // LANES)
        words = [m.minimum_signed(m.add(self.lane, LANES * i), sizes.words - 1) for i in range(lane_words)]
        first_token = m.multiply(self.row, sizes.tokens)

        def add(i, columns):
            loads = []
            for j in range(VALUES_AT_ONCE):
                source = m.add(m.multiply(i, VALUES_AT_ONCE), j)
                at = m.row_address(self.values, m.add(first_token, m.shuffle(token, source)), sizes.words)
                loads.append((m.shuffle(weight, source), [m.load(m.advance(at, word))[0] for word in words]))
            for one, mine in loads:
                # What has no weight may be no number.
                numbers = [
                    m.select(m.less_float(one, 1e-45), 0.0, x) for word in mine for x in _unpack(sizes.dtype, word)
                ]
                columns = [m.fma(one, x, column) for x, column in zip(numbers, columns, strict=True)]
            return columns

        rounds = m.divide(m.add(m.minimum_signed(count, LANES), VALUES_AT_ONCE - 1), VALUES_AT_ONCE)
        return m.loop(rounds, columns, add)

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
            number=self.parts, lane=self.lane,
        )  # fmt: skip
        place = m.add(m.multiply(self.row, sizes.group), self.head)
        for column in range(0, sizes.columns, COLUMNS):
            parts.store(m.value(column), self.out, m.multiply(place, sizes.head_dim), sizes.head_dim)
        first_sum = m.multiply(m.add(m.multiply(self.first, HEADS), self.warp), KINDS)
        found = sum_of_parts(self.lane, sums, first_sum, self.parts, LARGEST_PARTS)
        deviation = typical_deviation(
            sizes.rule, self.lane, self.scale, m.multiply(self.row, sizes.tokens), self.scored, self.own_limits[0],
            sink=sizes.sink, tokens=sizes.tokens,
        )  # fmt: skip
        certificate = certify(sizes.rule, found, self.own_limits, self.scored, deviation)
        count = m.value(0)
        for i in range(0, LARGEST_PARTS, LANES):
            part = m.add(self.lane, i)
            at = m.address(tokens, m.add(self.first, m.minimum_signed(part, m.subtract(self.parts, 1))))
            count = m.add(count, m.select(m.less(part, self.parts), m.load(at, hint="")[0], 0))
        numbers = [*certificate, found[-1], m.to_float(warp_sum(count, m.add))]
        m.when(m.less(self.lane, 1), lambda: store_numbers(numbers, self.summary, place))
