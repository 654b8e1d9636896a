"""The second round in one launch, for Hopper GPUs: kv heads of which a query head is short attend by lower limits.

    block     an equal share of the chunks of 1,024 tokens of a kv head that is short, and of its tokens without codes
              chunk (mosaic_chunk.py): bytes -> bits of the tokens that are attended -> their list, in shared memory
              list -> attention of each warp (mosaic_warp_attention.py)
    last blocks of a kv head   what follows from its parts (mosaic_conclusion.py)

Where no head is short, blocks end after a look at the marks. Where few are, all blocks share what there is to do.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import State
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.mosaic_certified_threshold import words as certified_words
from pallas_kernels.mosaic_chunk import CHUNK, THREAD_TOKENS, Chunk, chunk_words
from pallas_kernels.mosaic_conclusion import LARGEST_PARTS, Conclusion
from pallas_kernels.mosaic_found import KINDS
from pallas_kernels.mosaic_rules import Given, comparisons, is_kept, kept_tokens, load_limits, scored_and_others
from pallas_kernels.mosaic_warp_attention import WARPS, Sizes, WarpAttention

LANES = 32
# Blocks that are on the device at once.
BLOCKS = 264
# Of the tokens that have no codes yet, those that a block may list beside a chunk: one a thread.
RECENT = m.WARPGROUP
# Words of marks of 32 rows, under way at once.
MARKS_AT_ONCE = 8


def extend(
    query, keys, values, bins, scale, quantized, length, limits, short, state, out, summary,
    *, sink: int, softmax_scale: float, rule: Rule,
):  # fmt: skip
    """Attend by limits of a second round, in kv heads of which a query head is short.

    Args:
      query: [B,K,G,D]; keys, values: [B,K,T,D], as `mosaic_attention` takes them.
      bins, scale, quantized: as in `mosaic_attention.Known`; length: int32 [B].
      limits, short: float32 [B,K,H,LIMITS] and int32 [B,K,H], of `mosaic_verify.verify`.
      state: a reference, int32 [B,K,Z]; the kernel takes tickets there.
      out, summary: references, [B,K,G,D] and float32 [B,K,G,8], of `verify`; those of kv heads that attend anew are
        written.
    """
    batch, kv_heads, tokens, head_dim = keys.shape
    rows, group = batch * kv_heads, query.shape[2]
    sizes = _Sizes(
        attention=Sizes(
            kv_heads=kv_heads, rows=rows, group=group, tokens=tokens, head_dim=head_dim, dtype=keys.dtype.name,
            softmax_scale=softmax_scale, sink=sink, rule=rule,
        ),
        blocks=max(BLOCKS, rows),
        state_words=state.shape[-1],
        dtype=out.dtype.name,
    )  # fmt: skip
    part = (sizes.blocks, sizes.heads)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    m.call(
        functools.partial(_kernel, sizes),
        name="extend",
        out_type=(
            f32(part), f32(part), f32((*part, sizes.attention.columns)), f32((*part, KINDS)),
            jax.ShapeDtypeStruct((sizes.blocks,), jnp.int32),
        ),
        blocks=sizes.blocks,
        shared_words=sizes.shared_words,
    )(
        query.astype(keys.dtype), keys, values, bins, scale, quantized, length, limits, short, state, out, summary
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    attention: Sizes
    blocks: int
    state_words: int
    dtype: str

    @property
    def rows(self) -> int:
        return self.attention.rows

    @property
    def group(self) -> int:
        return self.attention.group

    @property
    def heads(self) -> int:
        return self.attention.heads

    @property
    def given(self) -> Given:
        assert self.attention.rule is not None
        return Given(deviations=self.attention.rule.deviations, group=self.group)

    # Places in shared memory, in words: what attention takes, a chunk, a list, the rule's words [WORDS,H], tokens of
    # each warp, a ticket.
    @property
    def chunk_at(self) -> int:
        return self.attention.shared_words

    @property
    def list_at(self) -> int:
        return self.chunk_at + chunk_words(self.group)

    @property
    def rule_at(self) -> int:
        return self.list_at + CHUNK + RECENT

    @property
    def totals_at(self) -> int:
        return self.rule_at + Given.WORDS * self.heads

    @property
    def ticket_at(self) -> int:
        return self.totals_at + WARPS

    @property
    def shared_words(self) -> int:
        return self.ticket_at + 1


def _kernel(
    sizes: _Sizes, query, keys, values, bins, scale, quantized, length, limits, short, state, out, summary, *refs
):  # fmt: skip
    """query [R,G,D], keys and values [R,T,D], bins [R,T/8,G,2], scale [R,T], quantized and length [B], limits
    [R,H,LIMITS], short [R,H]; state [R,Z], out [R,G,D] and summary [R,G,8], written to; of N blocks peaks and totals
    [N,H], outs [N,H,C], sums [N,H,KINDS], tokens [N]; shared memory: see `_Sizes`."""
    *parts_of_blocks, shared = refs
    lane = m.bit_and(m.thread_index(), LANES - 1)
    marks = _marks(sizes, lane, short)
    number = _count_short(sizes, marks)

    def share_out():
        log2_parts = _log2_parts(sizes, number)
        some = m.right(m.block_index(), log2_parts)

        def run():
            arrays = query, keys, values, bins, scale, quantized, length, limits, state, out, summary
            block = _Block(sizes, lane, _short_row(sizes, lane, marks, some), some, log2_parts, *arrays, shared)
            block.attend(*parts_of_blocks)
            m.barrier()
            block.conclusion.conclude(block.shared(sizes.ticket_at), *parts_of_blocks)

        m.when(m.less(some, number), run)

    m.when(m.less(0, number), share_out)


def _marks(sizes: _Sizes, lane, short):
    """A function of a round: of some rows, which are short: bits of 32 of them, and the first of these, each."""

    def look(i):
        looks = []
        for j in range(_words_at_once(sizes)):
            first = m.multiply(m.add(m.multiply(i, _words_at_once(sizes)), j), 32)
            row = m.add(first, lane)
            at = m.address(short, m.multiply(m.minimum_signed(row, sizes.rows - 1), sizes.heads))
            marks = [w for four in range(0, sizes.heads, 4) for w in m.load(at, words=4, offset=4 * four)]
            looks.append((first, m.less(row, sizes.rows), functools.reduce(m.bit_or, marks[: sizes.group])))
        return [(first, m.ballot(m.both(is_row, m.less(0, mark)))) for first, is_row, mark in looks]

    if _rounds(sizes) > 1:
        return look
    marks = look(m.value(0))
    return lambda i: marks


def _words_at_once(sizes: _Sizes) -> int:
    return min(-(-sizes.rows // 32), MARKS_AT_ONCE)


def _rounds(sizes: _Sizes) -> int:
    return -(-sizes.rows // (32 * _words_at_once(sizes)))


def _count_short(sizes: _Sizes, marks):
    """How many rows are short."""

    def add(i, carried):
        return [functools.reduce(m.add, [m.count_ones(word) for _, word in marks(i)], carried[0])]

    return m.loop(_rounds(sizes), [m.value(0)], add)[0]


def _log2_parts(sizes: _Sizes, number):
    """Of the parts of each of so many kv heads, which all have blocks. Their number is a power of two, since a division
    by what is not takes longer than all else of a block's start."""
    steps = range(1, LARGEST_PARTS.bit_length())
    return functools.reduce(m.add, [m.select(m.less(sizes.blocks >> i, number), 0, 1) for i in steps])


def _short_row(sizes: _Sizes, lane, marks, number):
    """The row that is short after so many others."""

    def look(i, carried):
        before, row = carried
        for first, word in marks(i):
            mine = m.add(before, m.count_ones(m.bit_and(word, m.subtract(m.left(1, lane), 1))))
            is_marked = m.less(0, m.bit_and(word, m.left(1, lane)))
            it = m.ballot(m.both(is_marked, m.both(m.not_less(mine, number), m.not_less(number, mine))))
            row = m.select(m.less(0, it), m.add(first, m.count_ones(m.subtract(it, 1))), row)
            before = m.add(before, m.count_ones(word))
        return [before, row]

    return m.loop(_rounds(sizes), [m.value(0), m.value(0)], look)[1]


class _Block:
    """A block's part of a kv head's tokens."""

    def __init__(
        self, sizes: _Sizes, lane, row, some, log2_parts, query, keys, values, bins, scale, quantized, length, limits,
        state, out, summary, shared,
    ):  # fmt: skip
        self.sizes, self.lane, self.row = sizes, lane, row
        first = m.left(some, log2_parts)
        self.log2_parts, self.parts = log2_parts, m.left(1, log2_parts)
        self.part, self._shared = m.subtract(m.block_index(), first), m.shared_address(shared)
        tokens = sizes.attention.tokens
        self.chunk = Chunk(row, sizes.group, tokens, bins, scale, self.shared(sizes.chunk_at))
        # Copied before it is known whether there are so many tokens: all else is on its way meanwhile.
        self.chunk.begin(m.multiply(self.part, CHUNK))
        self.limits = limits
        sequence = m.divide(row, sizes.attention.kv_heads)
        self.quantized, self.length = (m.load(m.address(x, sequence))[0] for x in (quantized, length))
        scored = m.maximum_signed(m.subtract(self.quantized, sizes.attention.sink), 0)
        # Tokens from here on are attended whatever is kept.
        self.recent = m.minimum_signed(self.quantized, self.length)
        self.attention = WarpAttention(
            sizes.attention, lane, row, query, keys, values, self._shared,
            bins=bins, scale=scale, limits=limits, scored=scored,
        )  # fmt: skip
        self.warp = self.attention.warp
        self.conclusion = Conclusion(
            sizes=sizes.attention, dtype=sizes.dtype, lane=lane, row=row, first=first, number=self.parts,
            log2_number=log2_parts, ticket=State(state, row, sizes.heads, sizes.state_words).ticket(), limits=limits,
            scored=scored, out=out, summary=summary,
        )  # fmt: skip

    def shared(self, place, word: Any = 0):
        """Address of a word of shared memory, from a place on."""
        return m.add(self._shared, m.left(m.add(word, place), 2))

    def attend(self, peaks, totals, outs, sums, tokens):
        """The block's part, to its place in the arrays."""
        sizes, attention = self.sizes, self.attention
        chunks = self._share(m.divide(m.add(self.recent, CHUNK - 1), CHUNK))
        recent = self._share(m.subtract(self.length, self.recent))
        rounds = m.maximum_signed(chunks, m.divide(m.add(recent, RECENT - 1), RECENT))
        start_of = lambda i: m.multiply(m.add(self.part, m.left(i, self.log2_parts)), CHUNK)  # noqa: E731
        self._store_rule()
        m.barrier()
        compare = comparisons(
            [m.load_shared(self.shared(sizes.rule_at), offset=4 * head)[0] for head in range(sizes.group)]
        )

        def attend_chunk(i, carried):
            *progress, total = carried
            count = self._list(start_of(i), compare, i, recent)
            # The next chunk is on its way while this one is attended.
            following = m.add(i, 1)
            m.when(m.less(following, rounds), lambda: self.chunk.begin(start_of(following)))
            progress = attention.attend(m.value(0), count, self._listed, progress)
            # The list makes way for the next one.
            m.barrier()
            return [*progress, m.add(total, count)]

        *progress, total = m.loop(rounds, [*attention.start(), m.value(0)], attend_chunk)
        # No copy may be under way when a block ends.
        m.wait_copies(0)
        m.store(m.address(tokens, m.block_index()), [total], where=m.less(m.thread_index(), 1))
        attention.share(progress)
        m.barrier()
        attention.add_up_warps(m.block_index(), peaks, totals, outs, sums)

    def _share(self, number):
        """How many of so many this block has, where it has every `parts`th."""
        left = m.maximum_signed(m.subtract(number, self.part), 0)
        return m.right(m.add(left, m.subtract(self.parts, 1)), self.log2_parts)

    def _listed(self, place):
        """The token at a place of the list."""
        return m.load_shared(self.shared(self.sizes.list_at, place))[0]

    def _store_rule(self):
        """What each head keeps."""
        sizes, head = self.sizes, m.thread_index()

        def store():
            limits = load_limits(self.limits, m.add(m.multiply(self.row, sizes.heads), head))
            words = certified_words(limits, sizes.given.deviations)
            for i, word in enumerate(words):
                m.store_shared(self.shared(sizes.rule_at, m.add(head, sizes.heads * i)), [word])

        m.when(m.less(head, sizes.group), store)

    def _list(self, start, compare, i, recent):
        """List a chunk's tokens that are attended, in shared memory, and the i-th `RECENT` of its so many recent
        ones; returns how many."""
        sizes, token = self.sizes, self.chunk.token(start)
        mask = self._attended(token, compare)
        count = m.count_ones(mask)
        through = count
        for lanes in (1, 2, 4, 8, 16):
            through = m.select(m.less(self.lane, lanes), through, m.add(through, m.shuffle_up(through, lanes)))
        at = self.shared(sizes.totals_at, self.warp)
        m.when(m.not_less(self.lane, LANES - 1), lambda: m.store_shared(at, [through]))
        m.barrier()
        of_warps = [m.load_shared(self.shared(sizes.totals_at), offset=4 * i)[0] for i in range(WARPS)]
        place = m.subtract(through, count)
        for warp, more in enumerate(of_warps):
            place = m.select(m.less(warp, self.warp), m.add(place, more), place)
        total = functools.reduce(m.add, of_warps)

        def store(i, carried):
            (rest,) = carried
            lowest = m.bit_and(rest, m.subtract(0, rest))
            at = self.shared(sizes.list_at, m.add(place, i))
            number = m.add(token, m.count_ones(m.subtract(lowest, 1)))
            m.when(m.less(0, rest), lambda: m.store_shared(at, [number]))
            return [m.bit_xor(rest, lowest)]

        m.loop(count, [mask], store)
        before = m.multiply(i, RECENT)
        number = m.minimum_signed(m.maximum_signed(m.subtract(recent, before), 0), RECENT)
        mine = m.add(m.left(m.add(before, m.thread_index()), self.log2_parts), m.add(self.recent, self.part))
        at = self.shared(sizes.list_at, m.add(total, m.thread_index()))
        m.when(m.less(m.thread_index(), number), lambda: m.store_shared(at, [mine]))
        m.barrier()
        return m.add(total, number)

    def _attended(self, token, compare):
        """Bits of this thread's tokens of the chunk, of which it has the first."""
        rule, heads, rule_at = self.sizes.given, self.sizes.heads, self.shared(self.sizes.rule_at)
        words = self.chunk.words()
        bits = kept_tokens(words, compare)
        scored, others = scored_and_others(
            token, sink=self.sizes.attention.sink, quantized=self.quantized, length=self.recent, number=THREAD_TOKENS
        )  # fmt: skip
        candidates = m.bit_and(rule.candidates(heads, rule_at)(words, bits), scored)

        def look(carried):
            margins = rule.load_margins(heads, rule_at)

            def look_at_one(_, carried):
                rest, found = carried
                lowest = m.bit_and(rest, m.subtract(0, rest))
                kept = is_kept(*self.chunk.bytes_and_scale(m.count_ones(m.subtract(lowest, 1))), margins)
                return [m.bit_xor(rest, lowest), m.bit_or(found, m.select(kept, lowest, 0))]

            return m.loop(m.count_ones(candidates), [candidates, *carried], look_at_one)[1:]

        (bits,) = m.update(m.less(0, candidates), [bits], look)
        return m.bit_or(m.bit_and(bits, scored), others)
