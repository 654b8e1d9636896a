"""The second round in one launch, for Hopper GPUs: kv heads of which a query head is short attend by lower limits.

    block     an equal share of the chunks of 2,048 tokens of a kv head that is short, for 4 of its query heads
              chunk: bytes -> bits of the tokens that are attended -> their list, in shared memory
              list -> attention of each warp (mosaic_warp_attention.py)
    last block of a kv head    outputs and sums of its parts added up; certificates

Where no head is short, blocks end after a look at the marks. Where few are, all blocks share what there is to do.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import HEADS, State
from pallas_kernels.mosaic_certificate import certify, load_sample, store_numbers, typical_deviation
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.mosaic_found import KINDS
from pallas_kernels.mosaic_parts import LARGEST_COLUMNS, Parts, columns_of
from pallas_kernels.mosaic_rules import LANE_TOKENS, attended_tokens, comparisons, load_limits, load_words
from pallas_kernels.mosaic_top_p_threshold import warp_sum
from pallas_kernels.mosaic_verify import sum_of_parts
from pallas_kernels.mosaic_warp_attention import CHUNK, LANES, WARPS, Sizes, WarpAttention

# Blocks that are on the device at once, and the most that a kv head's tokens are split into.
BLOCKS, LARGEST_PARTS = 264, 64


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
    sizes = Sizes(
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


def _kernel(
    sizes: Sizes, query, keys, values, bins, scale, quantized, length, limits, state, out, summary, peaks, totals,
    outs, sums, tokens, shared,
):  # fmt: skip
    """query [R,G,D], keys and values [R,T,D], bins [R,T/8,G,2], scale [R,T], quantized and length [B], limits
    [R,H,LIMITS]; state [R,Z], out [R,G,D] and summary [R,G,8], written to; of N blocks peaks and totals [N,4], outs
    [N,4,C], sums [N,4,KINDS], tokens [N]; shared memory: see `Sizes`."""
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


def _marks(sizes: Sizes, lane, state, i):
    """Bits of 32 rows, of those of which a head is short."""
    row = m.add(m.multiply(i, 32), lane)
    mark = m.load(State(state, m.minimum_signed(row, sizes.rows - 1), sizes.heads, sizes.state_words).short())[0]
    return m.ballot(m.both(m.less(row, sizes.rows), m.less(0, mark)))


def _count_short(sizes: Sizes, lane, state):
    """How many rows are short."""

    def add(i, carried):
        return [m.add(carried[0], m.count_ones(_marks(sizes, lane, state, i)))]

    return m.loop(-(-sizes.rows // 32), [m.value(0)], add)[0]


def _short_row(sizes: Sizes, lane, state, number):
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
        self, sizes: Sizes, lane, row, group, first, parts, query, keys, values, bins, scale, quantized, length,
        limits, state, out, summary, shared,
    ):  # fmt: skip
        self.sizes, self.lane, self.row, self.first, self.parts = sizes, lane, row, first, parts
        self.bins, self.scale, self.limits, self.out, self.summary = bins, scale, limits, out, summary
        sequence = m.divide(row, sizes.kv_heads)
        self.quantized, self.length = (m.load(m.address(x, sequence))[0] for x in (quantized, length))
        self.scored = m.maximum_signed(m.subtract(self.quantized, sizes.sink), 0)
        self.attention = WarpAttention(
            sizes, lane, row, group, query, keys, values, bins, scale, self.scored, limits, shared
        )  # fmt: skip
        self.warp, self.shared = self.attention.warp, self.attention.shared
        # Behind those that `mosaic_verify` takes.
        self.ticket = State(state, row, sizes.heads, sizes.state_words).ticket(m.add(group, sizes.heads))

    def attend(self, peaks, totals, outs, sums, tokens):
        """The block's part, to its place in the arrays."""
        sizes, attention = self.sizes, self.attention
        attention.store_queries()
        self._store_rule()
        attention.store_limits()
        m.barrier()
        compare = comparisons(
            [m.load_shared(self.shared(sizes.rule_at), offset=4 * head)[0] for head in range(sizes.group)]
        )
        part = m.subtract(m.block_index(), self.first)
        chunks = m.divide(m.add(self.length, CHUNK - 1), CHUNK)
        start = m.minimum_signed(part, chunks)
        rounds = m.divide(m.add(m.subtract(chunks, start), m.subtract(self.parts, 1)), self.parts)

        def attend_chunk(i, carried):
            chunk = m.add(part, m.multiply(i, self.parts))
            count = self._list(m.multiply(chunk, CHUNK), compare)
            progress = attention.attend(count, carried[:-1])
            # The list makes way for the next one.
            m.barrier()
            return [*progress, m.add(carried[-1], count)]

        *progress, total = m.loop(rounds, [*attention.start(), m.value(0)], attend_chunk)
        m.store(m.address(tokens, m.block_index()), [total], where=m.less(m.thread_index(), 1))
        attention.share(progress)
        m.barrier()
        attention.add_up_warps(peaks, totals, outs, sums)

    def _store_rule(self):
        """What each head keeps."""
        sizes, head = self.sizes, m.thread_index()

        def store():
            words = sizes.given.words(load_limits(self.limits, m.add(m.multiply(self.row, sizes.heads), head)))
            for i, word in enumerate(words):
                m.store_shared(self.shared(sizes.rule_at, m.add(head, sizes.heads * i)), [word])

        m.when(m.less(head, sizes.group), store)

    def _list(self, start, compare):
        """List a chunk's tokens that are attended, in shared memory; returns how many."""
        sizes = self.sizes
        token = m.add(start, m.multiply(m.thread_index(), LANE_TOKENS))
        words = load_words(self.bins, self.row, token, sizes.group, sizes.tokens)
        mask = attended_tokens(
            sizes.given, compare, words, (self.limits, self.scale), self.row, token, self.shared(sizes.rule_at),
            heads=sizes.heads, tokens=sizes.tokens, sink=sizes.sink, quantized=self.quantized, length=self.length,
        )  # fmt: skip
        count = m.count_ones(mask)
        through = count
        for lanes in (1, 2, 4, 8, 16):
            through = m.select(m.less(self.lane, lanes), through, m.add(through, m.shuffle_up(through, lanes)))
        at = self.shared(sizes.totals_at, self.warp)
        m.when(m.not_less(self.lane, LANES - 1), lambda: m.store_shared(at, [through]))
        m.barrier()
        of_warps = [m.load_shared(self.shared(sizes.totals_at), offset=4 * i)[0] for i in range(WARPS)]
        place = m.subtract(through, count)
        for i, more in enumerate(of_warps):
            place = m.select(m.less(i, self.warp), m.add(place, more), place)

        def store(i, carried):
            (rest,) = carried
            lowest = m.bit_and(rest, m.subtract(0, rest))
            at = self.shared(sizes.list_at, m.add(place, i))
            number = m.add(token, m.count_ones(m.subtract(lowest, 1)))
            m.when(m.less(0, rest), lambda: m.store_shared(at, [number]))
            return [m.bit_xor(rest, lowest)]

        m.loop(count, [mask], store)
        m.barrier()
        return functools.reduce(m.add, of_warps)

    def is_last(self):
        """Whether all other blocks of the kv head and these query heads are done."""
        m.barrier()
        at, is_first_thread = self.shared(self.sizes.ticket_at), m.less(m.thread_index(), 1)
        m.when(is_first_thread, lambda: m.store_shared(at, [m.take_ticket(self.ticket)]))
        m.barrier()
        return m.not_less(m.load_shared(at)[0], m.subtract(self.parts, 1))

    def conclude(self, peaks, totals, outs, sums, tokens):
        """Output and summary of each real head, from all parts."""
        m.when(self.attention.is_real, lambda: self._conclude(peaks, totals, outs, sums, tokens))

    def _conclude(self, peaks, totals, outs, sums, tokens):
        sizes = self.sizes
        parts = Parts(
            peaks, totals, outs, heads=HEADS, columns=sizes.columns, head=self.warp, first=self.first,
            number=self.parts, usual=LARGEST_PARTS, lane=self.lane,
        )  # fmt: skip
        place = m.add(m.multiply(self.row, sizes.group), self.attention.head)
        for column in range(0, sizes.columns, columns_of(LARGEST_PARTS)):
            parts.store(m.value(column), self.out, m.multiply(place, sizes.head_dim), sizes.head_dim)
        first_sum = m.multiply(m.add(m.multiply(self.first, HEADS), self.warp), KINDS)
        found = sum_of_parts(self.lane, sums, first_sum, self.parts, LARGEST_PARTS)
        first_token = m.multiply(self.row, sizes.tokens)
        sample = load_sample(self.lane, self.scale, first_token, self.scored, sink=sizes.sink, tokens=sizes.tokens)
        deviation = typical_deviation(sizes.rule, sample, self.attention.own_limits[0])
        certificate = certify(sizes.rule, found, self.attention.own_limits, self.scored, deviation)
        count = m.value(0)
        for i in range(0, LARGEST_PARTS, LANES):
            part = m.add(self.lane, i)
            at = m.address(tokens, m.add(self.first, m.minimum_signed(part, m.subtract(self.parts, 1))))
            count = m.add(count, m.select(m.less(part, self.parts), m.load_written(at)[0], 0))
        numbers = [*certificate, found[-1], m.to_float(warp_sum(count, m.add))]
        m.when(m.less(self.lane, 1), lambda: store_numbers(numbers, self.summary, place))
