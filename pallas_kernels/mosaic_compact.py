"""Top-p on counted bins, and the list of the tokens it keeps, in one launch; for Hopper GPUs.

    a warp, each head in turn     counts of bins, 8 a lane -> sums from the best bin down -> how many bins are kept
    a thread, 16 tokens in turn   bytes of all heads, compared as packed words -> 16 bits, sinks and window beside
    a block                       its tokens' place behind those of the blocks before, which wait for no block behind
    a thread                      tokens of its bits, to the list

Every block finds the thresholds anew: that takes less than a launch. Lists are in ascending order.

Mass is p or more. The mass of a bin's n tokens, over that of n tokens at its upper edge, lies between e^(-a w) and
(1 - a) + a e^(-w), since exp is convex: w is the bin's width in nats, and a, from 0 to 1, the tokens' mean place below
the edge. A kept bin counts with the lower bound, a dropped one with the upper; they are 0.2 % apart. Tokens above the
first bin count as `mosaic_score_bins` has bounded them from below.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_score_bins import BINS, BINS_PER_NAT, PLACES, State

LANE_BINS = BINS // 32
LANE_TOKENS = 16
PASS_TOKENS = LANE_TOKENS * m.WARPGROUP
# Passes of a block: so many that the blocks are on the device all at once, and still fill it.
BLOCKS, LARGEST_PASSES = 640, 6
LOG2_E = math.log2(math.e)
# Relative error that places, rounded to 1/512 of a bin, and float32 sums can make.
SLACK = 1e-3


def passes(rows: int, tokens: int) -> int:
    """Passes of `PASS_TOKENS` tokens that a block makes."""
    wanted = rows * tokens // (PASS_TOKENS * BLOCKS)
    return max(1, min(wanted, LARGEST_PASSES))


def blocks(rows: int, tokens: int) -> int:
    """Blocks of a row."""
    return -(-tokens // (PASS_TOKENS * passes(rows, tokens)))


def compact(bins, base, exact_lse, state, quantized, length, *, sink: int, top_p: float):
    """The tokens that Top-p keeps, sinks and window included.

    Args:
      bins: int32 [B,K,G,T/4], of `mosaic_score_bins.score_bins`.
      base, exact_lse: float32 [B,K,H], of `rabitq_jax.prepared_query.PreparedQuery`.
      state: a reference, int32 [B,K,Z], as `score_bins` leaves it.
      quantized, length: int32 [B].

    Returns:
      indices int32 [B,K,T], ascending, undefined at or past the count; counts int32 [B,K]; scored int32 [B,K,H], tokens
      in kept bins; mass float32 [B,K,H], share of the estimated mass that these hold.
    """
    batch, kv_heads, group, quarter = bins.shape
    rows, heads, tokens = batch * kv_heads, base.shape[2], 4 * quarter
    sizes = _Sizes(
        kv_heads=kv_heads, group=group, heads=heads, tokens=tokens, passes=passes(rows, tokens),
        blocks=blocks(rows, tokens), state_words=state.shape[-1], sink=sink, top_p=float(top_p),
    )  # fmt: skip
    out = functools.partial(jax.ShapeDtypeStruct, (batch, kv_heads, heads))
    return m.call(
        functools.partial(_kernel, sizes),
        name="compact",
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, tokens), jnp.int32),
            jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32),
            out(jnp.int32),
            out(jnp.float32),
        ),
        blocks=rows * sizes.blocks,
        shared_words=heads + (m.WARPGROUP + 4) * sizes.passes + 4,
    )(bins, base, exact_lse, quantized, length, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    kv_heads: int
    group: int
    heads: int
    tokens: int
    passes: int
    blocks: int
    state_words: int
    sink: int
    top_p: float

    @property
    def block_tokens(self) -> int:
        return PASS_TOKENS * self.passes


def _kernel(sizes: _Sizes, bins, base, exact_lse, quantized, length, state, indices, counts, scored, mass, shared):
    """bins [R,G,T/4], base and exact_lse [R,H], quantized and length [B], state [R,Z]; indices [R,T], counts
    [R], scored and mass [R,H]; shared memory: kept bins [H], bits of each thread [passes,128], kept tokens of each warp
    [passes,4], the block's place."""
    row = m.divide(m.block_index(), sizes.blocks)
    block = m.subtract(m.block_index(), m.multiply(row, sizes.blocks))
    start = m.multiply(block, sizes.block_tokens)
    sequence = m.divide(row, sizes.kv_heads)
    quantized, length = (m.load(m.address(x, sequence))[0] for x in (quantized, length))
    state = State(state, row, sizes.heads, sizes.state_words)
    shared = m.shared_address(shared)

    def run():
        first_words = _load_bins(sizes, bins, row, start, 0)
        _thresholds(sizes, row, block, base, exact_lse, state, scored, mass, shared)
        m.barrier()
        masks = _masks(sizes, bins, row, first_words, start, quantized, length, shared)
        place, total = _places(sizes, masks, block, state, shared)
        first = m.multiply(row, sizes.tokens)
        for i, (mask, at) in enumerate(zip(masks, place, strict=True)):
            m.store_ones(m.address(indices, m.add(first, at)), mask, _token(start, i))
        last = m.both(m.less(m.thread_index(), 1), m.not_less(m.add(start, sizes.block_tokens), length))
        m.when(last, lambda: m.store(m.address(counts, row), [total]))

    # The first block of an empty row says that it is empty.
    m.when(m.either(m.less(start, length), m.less(block, 1)), run)


def _token(start, i):
    """First token of this thread in pass i."""
    return m.add(m.add(start, m.multiply(i, PASS_TOKENS)), m.multiply(m.thread_index(), LANE_TOKENS))


def _load_bins(sizes: _Sizes, bins, row, start, i):
    """Words of this thread's tokens in pass i, 4 for each head in turn."""
    # A block may reach past the capacity, where no token is attended.
    token = m.minimum_signed(_token(start, i), sizes.tokens - LANE_TOKENS)
    head_words = sizes.tokens // 4
    word = m.add(m.multiply(m.multiply(row, sizes.group), head_words), m.right(token, 2))
    at = m.address(bins, word)
    return [w for head in range(sizes.group) for w in m.load(at, words=4, offset=4 * head_words * head)]


def _thresholds(sizes: _Sizes, row, block, base, exact_lse, state, scored, mass, shared):
    """Kept bins of each head to shared memory; their tokens and mass to the row's results."""
    warp, lane = m.right(m.thread_index(), 5), m.bit_and(m.thread_index(), 31)
    for group in range(sizes.heads // 4):
        head = m.add(warp, 4 * group)
        place = m.add(m.multiply(row, sizes.heads), head)
        top, lse = (m.as_float(m.load(m.address(x, place))[0]) for x in (base, exact_lse))
        peak = _from_key(m.load(state.peak(head))[0])
        at = state.bin(head, m.multiply(lane, LANE_BINS))
        words = [word for i in range(LANE_BINS // 2) for word in m.load(at, words=4, offset=16 * i)]
        at = state.above(head, m.multiply(lane, LANE_BINS))
        above = [word for i in range(LANE_BINS // 4) for word in m.load(at, words=4, offset=16 * i)]
        kept, tokens, share = _threshold(sizes.top_p, lane, words[::2], words[1::2], above, top, peak, lse)

        def store(head=head, place=place, kept=kept, tokens=tokens, share=share):
            m.store_shared(m.add(shared, m.left(head, 2)), [kept])

            def report():
                m.store(m.address(scored, place), [tokens])
                m.store(m.address(mass, place), [m.as_int(share)])

            m.when(m.less(block, 1), report)

        m.when(m.less(lane, 1), store)


def _threshold(top_p: float, lane, places, counts, above, base, peak, exact_lse):
    """How many bins, best first, surely hold the share: kept bins i32, tokens in them i32, estimated mass f32.

    Bin i holds scores from i to i + 1 bins' width below base; bin 0 also those above, the largest being peak; the last
    one also those below.
    """
    # Masses are relative to the largest score or to base, whichever is higher.
    highest = m.maximum(base, peak)
    first_bin = m.multiply(lane, LANE_BINS)
    largest = _exp(m.subtract_float(peak, highest))
    lane_depth = m.multiply_float(m.to_float(first_bin), 1 / BINS_PER_NAT)
    top = m.subtract_float(base, highest)
    # The upper edges of this lane's first bin, and of its first one above base.
    edge, edge_above = _exp(m.subtract_float(top, lane_depth)), _exp(m.add_float(top, lane_depth))
    counted = functools.reduce(m.add_float, [m.multiply_float(m.to_float(n), _nats(i)) for i, n in enumerate(above)])
    surely_above = _warp_sum(m.multiply_float(counted, m.multiply_float(edge_above, 1 / PLACES)), m.add_float)
    # An exact mass far above the peak needs no more precision than this.
    exact = _exp(m.minimum(m.subtract_float(exact_lse, highest), 60.0))
    is_first = m.less(lane, 1)
    upper, lower = [], []
    for i, (place, count) in enumerate(zip(places, counts, strict=True)):
        number = m.to_float(count)
        at_edge = m.multiply_float(number, m.multiply_float(edge, _nats(-i)))
        mean = m.multiply_float(
            m.to_float(place), m.reciprocal(m.maximum(m.multiply_float(number, float(PLACES)), 1.0))
        )
        low = m.multiply_float(at_edge, _least_exp(m.multiply_float(mean, 1 / BINS_PER_NAT)))
        high = m.multiply_float(at_edge, m.fma(mean, _nats(-1) - 1, 1.0))
        if i == 0:
            # The largest score is known, and lies in bin 0 if anything does; the others may be anywhere above its edge.
            below = m.multiply_float(edge, _nats(-1))
            others = m.maximum(m.fma(m.subtract_float(number, 1.0), below, largest), surely_above)
            low = m.select(is_first, m.select(m.less(count, 1), 0.0, others), low)
            high = m.select(is_first, number, high)
        if i == LANE_BINS - 1:
            is_last = m.less(30, lane)
            low, high = m.select(is_last, 0.0, low), m.select(is_last, at_edge, high)
        upper.append(high)
        lower.append(low)
    kept_lower, kept_upper = _running_sums(lane, lower), _running_sums(lane, upper)
    all_upper = m.shuffle(kept_upper[-1], 31)

    def short(kept_lower, kept_upper):
        """1 where the bins so far may not hold the share; 1 with NaN."""
        dropped = m.maximum(m.subtract_float(all_upper, kept_upper), 0.0)
        held = m.multiply_float(m.add_float(exact, kept_lower), 1 - top_p)
        return m.select(m.not_less_float(held, m.multiply_float(dropped, top_p * (1 + SLACK))), 0, 1)

    if top_p == 1:
        kept = m.value(BINS)
    else:
        number = functools.reduce(m.add, map(short, kept_lower, kept_upper))
        number = m.minimum_signed(m.add(_warp_sum(number, m.add), 1), BINS)
        kept = m.select(m.less(short(m.value(0.0), m.value(0.0)), 1), 0, number)
    middle = [m.multiply_float(m.add_float(a, b), 0.5) for a, b in zip(upper, lower, strict=True)]
    is_kept = [m.less(m.add(first_bin, i), kept) for i in range(LANE_BINS)]
    dropped = [m.select(k, 0.0, x) for k, x in zip(is_kept, middle, strict=True)]
    tokens = [m.select(k, count, 0) for k, count in zip(is_kept, counts, strict=True)]
    total, dropped = (_warp_sum(functools.reduce(m.add_float, x), m.add_float) for x in (middle, dropped))
    total = m.add_float(exact, total)
    share = m.subtract_float(
        1.0, m.multiply_float(dropped, m.reciprocal(m.select(m.less_float(0.0, total), total, 1.0)))
    )
    return kept, _warp_sum(functools.reduce(m.add, tokens), m.add), share


def _nats(bins: int) -> float:
    """The factor between the masses of scores so many bins apart."""
    return math.exp(bins / BINS_PER_NAT)


def _exp(x):
    return m.exp2(m.multiply_float(x, LOG2_E))


def _least_exp(x):
    """Just below e^-x, for x from 0 to 1/8: a series that alternates, up to a term that it subtracts."""
    return m.fma(x, m.fma(x, m.fma(x, -1 / 6, 0.5), -1.0), 1.0)


def _running_sums(lane, values):
    """Sums over all values up to each, in the order of lanes, then of a lane's list."""
    sums = [values[0]]
    for x in values[1:]:
        sums.append(m.add_float(sums[-1], x))
    through = sums[-1]
    for lanes in (1, 2, 4, 8, 16):
        through = m.select(m.less(lane, lanes), through, m.add_float(through, m.shuffle_up(through, lanes)))
    before = m.select(m.less(lane, 1), 0.0, m.shuffle_up(through, 1))
    return [m.add_float(before, x) for x in sums]


def _warp_sum(x, add):
    for lanes in (1, 2, 4, 8, 16):
        x = add(x, m.shuffle_xor(x, lanes))
    return x


def _from_key(key):
    """The f32 of an unsigned number of the same order, minus infinity for 0; see `mosaic_score_bins`."""
    bits = m.select(m.less(key, 0x80000000), m.bit_xor(key, 0xFFFFFFFF), m.bit_and(key, 0x7FFFFFFF))
    return m.select(m.less(key, 1), float("-inf"), m.as_float(bits))


def _masks(sizes: _Sizes, bins, row, words, start, quantized, length, shared):
    """16 bits a thread, for each pass: tokens that are attended. `words` are those of the first pass."""
    # Byte x is at least k if, of its high bit and the carry of the lower bits into it, one is set (k < 128), or both.
    # For k = 256 none is.
    compare = []
    for head in range(sizes.group):
        kept = m.load_shared(shared, offset=4 * head)[0]
        addend = m.multiply(m.subtract(128, m.bit_and(kept, 127)), 0x01010101)
        compare.append((m.select(m.less(kept, 256), addend, 0), m.select(m.less(kept, 128), 0xFFFFFFFF, 0)))

    def mask(i, words):
        nibbles = []
        for word in range(LANE_TOKENS // 4):
            dropped = m.value(0x80808080)
            for head, (addend, either) in enumerate(compare):
                four = words[LANE_TOKENS // 4 * head + word]
                carries = m.add(m.bit_and(four, 0x7F7F7F7F), addend)
                dropped = m.bit_and(dropped, m.majority(carries, four, either))
            kept = m.right(m.bit_xor(dropped, 0x80808080), 7)
            # The lowest bits of four bytes, side by side.
            nibbles.append(m.right(m.multiply(kept, 0x01020408), 24))
        bits = functools.reduce(m.bit_or, [m.left(m.bit_and(n, 15), 4 * j) for j, n in enumerate(nibbles)])
        token = _token(start, i)
        below = [_bits_below(limit, token) for limit in (m.value(sizes.sink), quantized, length)]
        sinks, coded, held = below
        is_scored = m.bit_and(coded, m.bit_xor(sinks, 0xFFFF))
        return m.bit_and(held, m.bit_or(bits, m.bit_xor(is_scored, 0xFFFF)))

    if sizes.passes == 1:
        return [mask(0, words)]
    # In a loop, with the next pass's words under way: all at once, they take so many registers that few blocks fit.
    mine = m.add(shared, m.left(m.add(m.thread_index(), sizes.heads), 2))

    def one_pass(i, words):
        following = _load_bins(sizes, bins, row, start, m.minimum_signed(m.add(i, 1), sizes.passes - 1))
        m.store_shared(m.add(mine, m.multiply(i, 4 * m.WARPGROUP)), [mask(i, words)])
        return following

    m.loop(sizes.passes, words, one_pass)
    return [m.load_shared(mine, offset=4 * m.WARPGROUP * i)[0] for i in range(sizes.passes)]


def _bits_below(limit, token):
    """16 bits, one where token + i < limit."""
    count = m.minimum_signed(m.maximum_signed(m.subtract(limit, token), 0), LANE_TOKENS)
    return m.subtract(m.left(1, count), 1)


def _places(sizes: _Sizes, masks, block, state, shared):
    """Where in the row's list each pass of this thread begins, and the list's length behind this block."""
    warp, lane = m.right(m.thread_index(), 5), m.bit_and(m.thread_index(), 31)
    totals = m.add(shared, 4 * (sizes.heads + m.WARPGROUP * sizes.passes))
    counts, through = [m.count_ones(mask) for mask in masks], []
    for i, count in enumerate(counts):
        for lanes in (1, 2, 4, 8, 16):
            count = m.select(m.less(lane, lanes), count, m.add(count, m.shuffle_up(count, lanes)))
        through.append(count)
        at = m.add(totals, m.left(warp, 2))
        m.when(m.not_less(lane, 31), lambda at=at, i=i, count=count: m.store_shared(at, [count], offset=16 * i))
    m.barrier()
    by_warp = [m.load_shared(totals, words=4, offset=16 * i) for i in range(sizes.passes)]
    total = functools.reduce(m.add, [count for four in by_warp for count in four])
    # One more, so that an empty block has said something too.
    publish = lambda: m.publish(state.block(block), m.add(total, 1))  # noqa: E731
    m.when(m.less(m.thread_index(), 1), publish)
    place_at = m.add(totals, 16 * sizes.passes)
    m.when(m.less(warp, 1), lambda: _store_place(sizes, lane, block, state, place_at))
    m.barrier()
    before = m.load_shared(place_at)[0]
    places, offset = [], before
    for four, count, until in zip(by_warp, counts, through, strict=True):
        place = m.add(offset, m.subtract(until, count))
        for w in range(4):
            place = m.select(m.less(w, warp), m.add(place, four[w]), place)
            offset = m.add(offset, four[w])
        places.append(place)
    return places, m.add(before, total)


def _store_place(sizes: _Sizes, lane, block, state, place_at):
    """Tokens of all blocks before, for one warp to find: 32 blocks at a time."""

    def add(i, carried):
        other = m.add(m.multiply(i, 32), lane)
        is_before = m.less(other, block)
        # Lanes past the last block look at their own, which is done.
        published = m.wait_published(state.block(m.select(is_before, other, block)))
        return [m.add(carried[0], m.select(is_before, m.subtract(published, 1), 0))]

    (mine,) = m.loop(m.right(m.add(block, 31), 5), [m.value(0)], add)
    place = _warp_sum(mine, m.add)
    m.when(m.less(lane, 1), lambda: m.store_shared(place_at, [place]))
