"""The end of a first round: outputs of its parts added up, and what found tokens say of the rest; for Hopper GPUs.

    block of sums       every n-th run of 32 places of a list -> sums of 4 query heads, a warp each (mosaic_found.py);
                        the last warp of a head goes on to its certificate, and limits of a second round
    block of outputs    some columns of 4 query heads, a warp each (mosaic_parts.py)

The two kinds have nothing to do with each other, but for being one launch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import HEADS, State, word_of
from pallas_kernels.mosaic_certificate import (
    SUMMARY,
    certify,
    limits_of_second_round,
    load_sample,
    scale_of,
    store_numbers,
    typical_deviation,
)
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.mosaic_found import KINDS, TERMS, Found, byte_of, sum_of_lanes
from pallas_kernels.mosaic_parts import Parts, columns_of
from pallas_kernels.mosaic_rules import load_limits

LANES = 32
# Blocks of sums that keep the device busy, and the most that a list is split into.
BLOCKS, LARGEST_PARTS = 896, 64
# Found tokens of a warp that wait: fewer than a warp's lanes, and as many more; of 4 words each.
QUEUE = 2 * LANES


def verify(
    partial, indices, counts, logits, records, bins, scale, quantized, limits, state,
    *, sink: int, head_dim: int, rule: Rule,
):  # fmt: skip
    """Outputs and certificates.

    Args:
      partial: ends, peaks, totals and outputs of `gathered_attention.attend`.
      indices: int32 [B,K,T]; counts: int32 [B,K].
      logits: float32 [R,G,T], the exact logits of the listed tokens, in the lists' order; R = B K.
      records: of `mosaic_compact.compact_noisy`, or None.
      bins: int32 [B,K,T/8,G,2], of `mosaic_score_bins.score_bins`; scale: bfloat16 [B,K,T]; quantized: int32 [B].
      limits: float32 [B,K,H,LIMITS], that the lists were made by.
      state: a reference, int32 [B,K,Z], of which tickets and marks of short rows are zero; the kernel writes these.

    Returns:
      Output float32 [B,K,G,D]; summary float32 [B,K,G,8], of `rabitq_jax.certificate.Round`; limits of a second round
      float32 [B,K,H,LIMITS], the last number being 1 where a head is short and 0 elsewhere; undefined in heads that are
      not real; and the sums of parts float32 [R,H/4,N,4,KINDS].
    """
    batch, kv_heads, heads = limits.shape[:3]
    rows, groups, group = batch * kv_heads, heads // HEADS, bins.shape[3]
    places, part_heads, columns = partial[3].shape
    # Those that a list has as a rule: a program's each, and one that it shares.
    usual = (places - rows) // rows + 1
    sizes = _Sizes(
        kv_heads=kv_heads, group=group, groups=groups, tokens=indices.shape[-1], sink=sink, head_dim=head_dim,
        parts=max(1, min(BLOCKS // (rows * groups), LARGEST_PARTS)), slices=-(-head_dim // columns_of(usual)),
        rows=rows, state_words=state.shape[-1], part_heads=part_heads, part_columns=columns, rule=rule,
        recorded=records is not None, usual=usual,
    )  # fmt: skip
    # Where tokens are recorded, nothing is read at their places.
    known = (bins, scale) if records is None else (records, scale)
    return m.call(
        functools.partial(_kernel, sizes),
        name="verify",
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, group, SUMMARY), jnp.float32),
            jax.ShapeDtypeStruct(limits.shape, jnp.float32),
            jax.ShapeDtypeStruct((rows, groups, sizes.parts, HEADS, KINDS), jnp.float32),
        ),
        blocks=rows * groups * (sizes.slices + sizes.parts),
        shared_words=HEADS * 4 * QUEUE,
    )(*partial, indices, counts, logits, *known, quantized, limits, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    kv_heads: int
    group: int
    groups: int
    tokens: int
    parts: int
    slices: int
    rows: int
    state_words: int
    part_heads: int
    part_columns: int
    recorded: bool
    usual: int
    sink: int
    head_dim: int
    rule: Rule

    @property
    def blocks_of_outputs(self) -> int:
        return self.rows * self.groups * self.slices


def _kernel(
    sizes: _Sizes, ends, peaks, totals, outs, indices, counts, logits, bins, scale, quantized, limits, state, out,
    summary, lower, sums, shared,
):  # fmt: skip
    """ends [R,2], peaks and totals [N,M], outs [N,M,C], indices [R,T], counts [R], logits [R,G,T], bins [R,T/8,G,2] or
    records [R,T,1 + H/4], scale [R,T], quantized [B], limits [R,H,LIMITS]; state [R,Z]; out [R,G,D], summary [R,G,8],
    lower [R,H,LIMITS], sums [R,H/4,N,4,KINDS]; shared memory: queues of
    the warps."""
    warp, lane = m.right(m.thread_index(), 5), m.bit_and(m.thread_index(), LANES - 1)

    def work_of(block, parts: int):
        """Row, group of heads, this warp's head, and part."""
        some = m.divide(block, parts)
        row = m.divide(some, sizes.groups)
        group = m.subtract(some, m.multiply(row, sizes.groups))
        return row, group, m.add(m.multiply(group, HEADS), warp), m.subtract(block, m.multiply(some, parts))

    def add_up_sums():
        block = m.subtract(m.block_index(), sizes.blocks_of_outputs)
        row, _, head, part = work_of(block, sizes.parts)
        m.when(m.less(head, sizes.group), lambda: add_up_head(block, row, head, part))

    def add_up_head(block, row, head, part):
        scored = m.load(m.address(quantized, m.divide(row, sizes.kv_heads)))[0]
        scored = m.maximum_signed(m.subtract(scored, sizes.sink), 0)
        count = m.load(m.address(counts, row))[0]
        mine = load_limits(limits, m.add(m.multiply(row, HEADS * sizes.groups), head))
        queue = m.add(m.shared_address(shared), m.multiply(warp, 16 * QUEUE))
        source = (_Recorded if sizes.recorded else _Scattered)(sizes, row, head, indices, logits, bins, scale)
        work = _Work(sizes, lane, count, scored, source, Found(sizes.rule, mine), queue)
        total = sum_of_lanes(lane, work.sums(part))
        at = m.address(sums, m.add(m.multiply(m.add(m.multiply(block, HEADS), warp), KINDS), m.right(lane, 2)))
        m.store(at, [m.as_int(total)], where=m.less(m.bit_and(lane, 3), 1))
        # Under way while the warp waits for its ticket.
        first_token = m.multiply(row, sizes.tokens)
        sample = load_sample(lane, scale, first_token, scored, sink=sizes.sink, tokens=sizes.tokens)
        states = State(state, row, HEADS * sizes.groups, sizes.state_words)
        m.warp_barrier()
        (ticket,) = m.update(m.less(lane, 1), [m.value(0)], lambda _: [m.take_ticket(states.ticket(head))])
        is_last = m.not_less(m.shuffle(ticket, 0), sizes.parts - 1)

        def conclude():
            first = m.add(m.multiply(m.subtract(block, part), HEADS * KINDS), m.multiply(warp, KINDS))
            _conclude(sizes, row, head, lane, count, scored, sample, mine, sums, first, states, summary, lower)

        m.when(is_last, conclude)

    def add_up_outputs():
        row, _, head, part = work_of(m.block_index(), sizes.slices)

        def run():
            first, last = m.load(m.address(ends, m.left(row, 1)), words=2)
            number = m.select(m.less(m.load(m.address(counts, row))[0], 1), 0, m.add(m.subtract(last, first), 1))
            parts = Parts(
                peaks, totals, outs, heads=sizes.part_heads, columns=sizes.part_columns, head=head, first=first,
                number=number, usual=sizes.usual, lane=lane,
            )  # fmt: skip
            word = m.multiply(m.add(m.multiply(row, sizes.group), head), sizes.head_dim)
            parts.store(m.multiply(part, columns_of(sizes.usual)), out, word, sizes.head_dim)

        m.when(m.less(head, sizes.group), run)

    # The short ones first: those that do not fit on the device at once then need not wait for long.
    of_outputs = m.less(m.block_index(), sizes.blocks_of_outputs)
    m.when(of_outputs, add_up_outputs)
    m.when(m.negate(of_outputs), add_up_sums)


class _Source:
    """What a warp reads of listed tokens: at a place in the list `WORDS` words, which are under way one place ahead."""

    WORDS: int

    def __init__(self, sizes: _Sizes, row, head, indices, logits, bins, scale):
        self.sizes, self.row, self.head = sizes, row, head
        self.indices, self.logits, self.bins, self.scale = indices, logits, bins, scale
        self.first_token = m.multiply(row, sizes.tokens)
        self.first_logit = m.multiply(m.add(m.multiply(row, sizes.group), head), sizes.tokens)

    def start(self, place, stride):
        """The words of a place, of which the next one is so many further on. Behind the list's end, any."""
        raise NotImplementedError

    def advance(self, words, place, stride):
        """The words of the place behind the one whose words are given."""
        raise NotImplementedError

    def read(self, words):
        """Token, exact logit, bin and scale."""
        raise NotImplementedError

    def _within(self, place):
        return m.minimum_signed(place, self.sizes.tokens - 1)


class _Scattered(_Source):
    """Bins and scales lie at their tokens' places: the next place's token is known one place ahead."""

    WORDS = 5

    def start(self, place, stride):
        token = self._token(place)
        return [token, self._token(m.add(place, stride)), *self._words(place, token)]

    def advance(self, words, place, stride):
        following = words[1]
        return [following, self._token(m.add(place, stride)), *self._words(place, following)]

    def read(self, words):
        token, _, pair, logit, word = words
        return token, m.as_float(logit), byte_of(word, token), scale_of(pair, m.add(self.first_token, token))

    def _token(self, place):
        token = m.load(m.address(self.indices, m.add(self.first_token, self._within(place))))[0]
        return self._within(m.maximum_signed(token, 0))

    def _words(self, place, token):
        return [
            *m.load(m.address(self.scale, m.right(m.add(self.first_token, token), 1))),
            *m.load(m.address(self.logits, m.add(self.first_logit, self._within(place)))),
            *m.load(m.address(self.bins, word_of(self.row, token, self.head, self.sizes.group, self.sizes.tokens))),
        ]


class _Recorded(_Source):
    """Compaction has written down bins and scales in the list's order: `bins` are these records."""

    WORDS = 4

    def start(self, place, stride):
        del stride
        place = self._within(place)
        record = m.multiply(m.add(self.first_token, place), 1 + self.sizes.groups)
        return [
            *m.load(m.address(self.indices, m.add(self.first_token, place))),
            *m.load(m.address(self.bins, record)),
            *m.load(m.address(self.logits, m.add(self.first_logit, place))),
            *m.load(m.address(self.bins, m.add(record, m.add(m.right(self.head, 2), 1)))),
        ]

    def advance(self, words, place, stride):
        del words
        return self.start(place, stride)

    def read(self, words):
        token, scale, logit, word = words
        return token, m.as_float(logit), byte_of(word, self.head), m.as_float(m.left(scale, 16))


class _Work:
    """A warp's part of a list."""

    def __init__(self, sizes: _Sizes, lane, count, scored, source: _Source, found: Found, queue):
        self.sizes, self.lane, self.count, self.scored = sizes, lane, count, scored
        self.source, self.found, self.queue = source, found, queue

    def sums(self, part):
        """Of this lane's tokens, `KINDS` f32. Those that were found wait in a queue until they fill a warp, since their
        terms take most of the time."""
        stride = self.sizes.parts * LANES
        first = m.add(m.multiply(part, LANES), self.lane)

        def add_token(i, carried):
            place = m.add(first, m.multiply(i, stride))
            words, (waiting, *totals) = carried[: self.source.WORDS], carried[self.source.WORDS :]
            under_way = self.source.advance(words, m.add(place, stride), stride)
            token, logit, bin_, scale = self.source.read(words)
            is_listed = m.less(place, self.count)
            # In unsigned numbers: sinks are far above.
            is_scored = m.less(m.subtract(token, self.sizes.sink), self.scored)
            is_found = m.both(m.both(is_listed, is_scored), m.less(bin_, self.found.kept(scale)))
            is_own = m.either(is_found, m.both(is_listed, m.negate(is_scored)))
            masses = self.found.masses(logit, is_listed, is_own)
            totals[:-TERMS] = [m.add_float(x, y) for x, y in zip(totals[:-TERMS], masses, strict=True)]
            found = m.ballot(is_found)
            before = m.count_ones(m.bit_and(found, m.subtract(m.left(1, self.lane), 1)))
            at = self._entry(m.add(waiting, before))
            m.when(is_found, lambda: m.store_shared(at, [m.as_int(logit), m.as_int(scale), bin_, bin_]))
            waiting = m.add(waiting, m.count_ones(found))
            m.warp_barrier()
            is_full = m.not_less(waiting, LANES)
            waiting = m.select(is_full, m.subtract(waiting, LANES), waiting)
            totals = m.update(is_full, totals, lambda totals: self._add_waiting(waiting, LANES, totals))
            return [*under_way, waiting, *totals]

        # Of this part, the same in all lanes.
        start = m.minimum_signed(m.multiply(part, LANES), self.count)
        runs = m.divide(m.add(m.subtract(self.count, start), stride - 1), stride)
        carried = [*self.source.start(first, stride), m.value(0), *[m.value(0.0)] * KINDS]
        waiting, *totals = m.loop(runs, carried, add_token)[self.source.WORDS :]
        return self._add_waiting(m.value(0), waiting, totals)

    def _entry(self, i):
        return m.add(self.queue, m.left(i, 4))

    def _add_waiting(self, first, number, totals):
        """The totals with the terms of so many tokens of the queue, a lane each."""
        logit, scale, bin_, _ = m.load_shared(self._entry(m.add(first, self.lane)), words=4)
        terms = self.found.terms(m.as_float(logit), bin_, m.as_float(scale), m.less(self.lane, number))
        # The places may be taken anew.
        m.warp_barrier()
        return totals[:-TERMS] + [m.add_float(x, y) for x, y in zip(totals[-TERMS:], terms, strict=True)]


def _conclude(
    sizes: _Sizes, row, head, lane, count, scored, sample, limits, sums, first_sum, states: State, summary, lower
):  # fmt: skip
    """A head's certificate, and its limits of a second round."""
    rule = sizes.rule
    totals = sum_of_parts(lane, sums, first_sum, sizes.parts, sizes.parts)
    certificate = certify(rule, totals, limits, scored, typical_deviation(rule, sample, limits[0]))
    second = limits_of_second_round(rule, lane, states, head, limits, certificate)

    def store():
        numbers = [*certificate, totals[-1], m.to_float(count)]
        store_numbers(numbers, summary, m.add(m.multiply(row, sizes.group), head))
        store_numbers(second, lower, m.add(m.multiply(row, HEADS * sizes.groups), head))
        m.when(m.less_float(0.0, second[-1]), lambda: m.store(states.short(), [m.value(1)]))

    m.when(m.less(lane, 1), store)


def sum_of_parts(lane, sums, first, parts, most: int):
    """A head's sums of all its parts, `most` at most: `KINDS` f32, the same in all lanes. Lane 8 i + kind adds up every
    fourth part."""
    kind, some = m.bit_and(lane, KINDS - 1), m.right(lane, 3)
    loads = []
    for i in range(0, most, LANES // KINDS):
        part = m.add(some, i)
        place = m.minimum_signed(part, m.subtract(parts, 1))
        at = m.address(sums, m.add(m.add(first, m.multiply(place, HEADS * KINDS)), kind))
        loads.append((part, m.load_written(at)[0]))
    mine = functools.reduce(m.add_float, [m.select(m.less(part, parts), m.as_float(word), 0.0) for part, word in loads])
    for lanes in (8, 16):
        mine = m.add_float(mine, m.shuffle_xor(mine, lanes))
    return [m.shuffle(mine, kind) for kind in range(KINDS)]
