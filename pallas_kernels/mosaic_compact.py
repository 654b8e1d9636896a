"""Top-p on counted bins, and the list of the tokens it keeps, in one launch; for Hopper GPUs.

    a warp, each head in turn     counts of bins, 8 a lane -> sums from the best bin down -> how many bins are kept
    a thread, 16 tokens in turn   bytes of all heads -> 16 bits, sinks and window beside; candidates
    a thread                      its candidates, few if any: their scales say whether they are kept
    a block                       its tokens' place behind those of the blocks before, which wait for no block behind
    a thread                      tokens of its bits, to the list

Every block finds the thresholds anew: that takes less than a launch. Lists are in ascending order.

What is kept is said by a rule of mosaic_rules.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels import mosaic_certified_threshold as certified
from pallas_kernels.mosaic_bins import State, state_words, word_of
from pallas_kernels.mosaic_certificate import scale_of
from pallas_kernels.mosaic_found import byte_of
from pallas_kernels.mosaic_rules import (
    LANE_TOKENS,
    LIMITS,
    Given,
    Rule,
    TopP,
    Weights,
    comparisons,
    is_kept,
    kept_tokens,
    load_words,
    scored_and_others,
)
from pallas_kernels.mosaic_top_p_threshold import warp_sum

PASS_TOKENS = LANE_TOKENS * m.WARPGROUP
# Passes of a block: so many that the blocks are on the device all at once, and still fill it.
BLOCKS, LARGEST_PASSES = 640, 6
# A rule that looks at deviations takes more registers: fewer blocks fit.
NOISY_BLOCKS, LARGEST_NOISY_PASSES = 512, 8
GIVEN_PASSES = 2
# Candidates whose scales a thread waits for at a time.
CANDIDATES = 2


def passes_of(rows: int, tokens: int, *, noisy: bool = False) -> int:
    """Passes of `PASS_TOKENS` tokens that a block makes."""
    blocks, largest = (NOISY_BLOCKS, LARGEST_NOISY_PASSES) if noisy else (BLOCKS, LARGEST_PASSES)
    return max(1, min(rows * tokens // (PASS_TOKENS * blocks), largest))


def blocks(rows: int, tokens: int) -> int:
    """Blocks of a row."""
    return -(-tokens // (PASS_TOKENS * passes_of(rows, tokens)))


def compact(bins, base, exact_lse, state, quantized, length, *, sink: int, top_p: float):
    """The tokens that Top-p keeps, sinks and window included.

    Args:
      bins: int32 [B,K,T/8,G,2], of `mosaic_score_bins.score_bins`.
      base, exact_lse: float32 [B,K,H], of `rabitq_jax.prepared_query.PreparedQuery`.
      state: a reference, int32 [B,K,Z], as `score_bins` leaves it.
      quantized, length: int32 [B].

    Returns:
      indices int32 [B,K,T], ascending, undefined at or past the count; counts int32 [B,K]; scored int32 [B,K,H], tokens
      in kept bins; mass float32 [B,K,H], share of the estimated mass that these hold.
    """
    reports = ((jnp.int32, ()), (jnp.float32, ()))
    rule = TopP(top_p=float(top_p))
    return _call(rule, (base, exact_lse), bins, base.shape[2], state, quantized, length, reports, sink=sink)


def compact_noisy(
    bins, base, exact_lse, noise, scale, state, quantized, length, *, sink: int, rule: certified.Rule
):  # fmt: skip
    """The tokens that hold a share of the true mass; `rabitq_jax.thresholds.debiased_thresholds` and
    `certified_thresholds`.

    Args:
      noise: float32 [B,K,H]; scale: bfloat16 [B,K,T].
      Others: as of `compact`, of scores with noise.

    Returns:
      indices and counts, as `compact`; and limits float32 [B,K,H,LIMITS] of `mosaic_certified_threshold`.
    """
    rules, inputs = Weights(rule=rule, group=bins.shape[3]), (base, exact_lse, noise, scale)
    reports = ((jnp.float32, (LIMITS,)),)
    return _call(rules, inputs, bins, base.shape[2], state, quantized, length, reports, sink=sink)


def compact_given(bins, limits, short, scale, state, quantized, length, *, sink: int, deviations: float):
    """The tokens that limits keep, in kv heads of which one is short.

    Args:
      limits, short: float32 [B,K,H,LIMITS] and int32 [B,K,H], of `mosaic_verify.verify`; the others' lists are empty.
      state: a reference, int32 [B,K,Z] of zeros, Z of `given_state_words`.
      Others: as of `compact_noisy`.

    Returns:
      indices and counts, as `compact`.
    """
    rule = Given(deviations=float(deviations), group=bins.shape[3])
    inputs = limits, short, scale
    return _call(rule, inputs, bins, limits.shape[2], state, quantized, length, (), sink=sink, passes=GIVEN_PASSES)


def given_state_words(tokens: int) -> int:
    """Words of a kv head's state for `compact_given`."""
    return state_words(0, -(-tokens // (PASS_TOKENS * GIVEN_PASSES)))


def _call(
    rule: Rule, inputs, bins, heads: int, state, quantized, length, reports, *, sink: int, passes=None
):  # fmt: skip
    batch, kv_heads, octets, group, _ = bins.shape
    rows, tokens = batch * kv_heads, 8 * octets
    passes = passes or passes_of(rows, tokens, noisy=rule.margin)
    sizes = _Sizes(
        kv_heads=kv_heads, group=group, heads=heads, tokens=tokens, passes=passes,
        blocks=-(-tokens // (PASS_TOKENS * passes)), state_words=state.shape[-1], sink=sink, rule=rule,
    )  # fmt: skip
    return m.call(
        functools.partial(_kernel, sizes),
        name="compact",
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, tokens), jnp.int32),
            jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32),
            *(jax.ShapeDtypeStruct((batch, kv_heads, heads, *shape), dtype) for dtype, shape in reports),
        ),
        blocks=rows * sizes.blocks,
        shared_words=sizes.shared_words,
    )(bins, *inputs, quantized, length, state)


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
    rule: Rule

    @property
    def block_tokens(self) -> int:
        return PASS_TOKENS * self.passes

    @property
    def has_scales(self) -> bool:
        """Whether scales are copied before it is known which are looked at: of one pass, that takes no time."""
        return self.rule.margin and self.passes == 1

    # Places in shared memory, in words: what each head keeps [WORDS,H], masks of each thread [passes,128], attended
    # tokens of each warp [passes,4], the block's place, and scales of each thread's tokens [128,8].
    @property
    def masks_at(self) -> int:
        return self.heads * self.rule.WORDS

    @property
    def totals_at(self) -> int:
        return self.masks_at + m.WARPGROUP * self.passes

    @property
    def place_at(self) -> int:
        return self.totals_at + 4 * self.passes

    @property
    def scales_at(self) -> int:
        return self.place_at + 4

    @property
    def shared_words(self) -> int:
        return self.scales_at + (m.WARPGROUP * LANE_TOKENS // 2 if self.has_scales else 0)


def _kernel(sizes: _Sizes, bins, *refs):
    """bins [R,T/8,G,2], the rule's inputs, quantized and length [B], state [R,Z]; indices [R,T], counts [R], the rule's
    reports; shared memory: see `_Sizes`."""
    *refs, shared = refs
    inputs, refs = refs[: sizes.rule.INPUTS], refs[sizes.rule.INPUTS :]
    quantized, length, state, indices, counts, *reports = refs
    row = m.divide(m.block_index(), sizes.blocks)
    block = m.subtract(m.block_index(), m.multiply(row, sizes.blocks))
    start = m.multiply(block, sizes.block_tokens)
    sequence = m.divide(row, sizes.kv_heads)
    quantized, length = (m.load(m.address(x, sequence))[0] for x in (quantized, length))
    length = sizes.rule.length(inputs, row, length)
    state = State(state, row, sizes.heads if sizes.rule.COUNTED else 0, sizes.state_words)
    shared = m.shared_address(shared)

    def run():
        first_words = load_words(bins, row, _token(start, 0), sizes.group, sizes.tokens)
        if sizes.has_scales:
            _copy_scales(sizes, inputs[-1], row, start, shared)
        scored = m.maximum_signed(m.subtract(quantized, sizes.sink), 0)
        _find_limits(sizes, row, block, scored, inputs, state, reports, shared)
        m.barrier()
        masks = _masks(sizes, bins, inputs, row, first_words, start, quantized, length, shared)
        place, before, total = _places(sizes, masks, block, state, shared)
        first = m.multiply(row, sizes.tokens)
        for i, (mask, at) in enumerate(zip(masks, place, strict=True)):
            m.store_ones(m.address(indices, m.add(first, at)), mask, _token(start, i))
        last = m.both(m.less(m.thread_index(), 1), m.not_less(m.add(start, sizes.block_tokens), length))
        m.when(last, lambda: m.store(m.address(counts, row), [m.add(before, total)]))

    # The first block of an empty row says that it is empty.
    m.when(m.either(m.less(start, length), m.less(block, 1)), run)


def _token(start, i):
    """First token of this thread in pass i."""
    return m.add(m.add(start, m.multiply(i, PASS_TOKENS)), m.multiply(m.thread_index(), LANE_TOKENS))


def _find_limits(sizes: _Sizes, row, block, scored, inputs, state, reports, shared):
    """What each head keeps, to shared memory, the rule's words [WORDS,H]; the first block of a row reports."""
    warp, lane = m.right(m.thread_index(), 5), m.bit_and(m.thread_index(), 31)
    for group in range(sizes.heads // 4):
        head = m.add(warp, 4 * group)
        place = m.add(m.multiply(row, sizes.heads), head)
        words, report = sizes.rule.find(inputs, place, head, lane, state, scored)

        def store(head=head, place=place, words=words, report=report):
            for i, word in enumerate(words):
                m.store_shared(m.add(shared, m.left(head, 2)), [word], offset=4 * sizes.heads * i)
            m.when(m.less(block, 1), lambda: report(reports, place))

        m.when(m.less(lane, 1), store)


def _scales_of_thread(sizes: _Sizes, shared):
    """Address of its tokens' scales."""
    return m.add(shared, m.left(m.add(m.multiply(m.thread_index(), LANE_TOKENS // 2), sizes.scales_at), 2))


def _copy_scales(sizes: _Sizes, scale, row, start, shared):
    """Begin to copy those of this thread's tokens."""
    # A block may reach past the capacity, where no token is a candidate.
    token = m.minimum_signed(_token(start, 0), sizes.tokens - LANE_TOKENS)
    at = m.address(scale, m.right(m.add(m.multiply(row, sizes.tokens), token), 1))
    for i in range(0, 2 * LANE_TOKENS, 16):
        m.copy(_scales_of_thread(sizes, shared), at, words=4, shared_offset=i, offset=i)
    m.end_copies()


def _masks(sizes: _Sizes, bins, inputs, row, words, start, quantized, length, shared):
    """16 bits a thread, for each pass: tokens that are attended. `words` are those of the first pass."""
    compare = comparisons([m.load_shared(shared, offset=4 * head)[0] for head in range(sizes.group)])
    candidates = sizes.rule.candidates(sizes.heads, shared)
    mine = m.add(shared, m.left(m.add(m.thread_index(), sizes.masks_at), 2))

    def store_mask(i, words):
        """Candidates are the upper half: to look at their scales here would hold up every pass."""
        bits = kept_tokens(words, compare)
        scored, others = scored_and_others(_token(start, i), sink=sizes.sink, quantized=quantized, length=length)
        mask = m.bit_or(m.bit_and(bits, scored), others)
        word = m.bit_or(mask, m.left(m.bit_and(candidates(words, bits), scored), 16))
        m.store_shared(_mask_of(mine, i), [word])

    def one_pass(i, words):
        next_pass = m.minimum_signed(m.add(i, 1), sizes.passes - 1)
        following = load_words(bins, row, _token(start, next_pass), sizes.group, sizes.tokens)
        store_mask(i, words)
        return following

    if sizes.passes == 1:
        store_mask(0, words)
    else:
        # In a loop, with the next pass's words under way: all at once, they take so many registers that few blocks fit.
        m.loop(sizes.passes, words, one_pass)
    if sizes.rule.margin:
        _look_at_candidates(sizes, bins, inputs[-1], row, start, mine, shared)
    return _load_masks(sizes, mine)


def _mask_of(mine, i):
    """Address of this thread's mask of pass i."""
    return m.add(mine, m.multiply(i, 4 * m.WARPGROUP))


def _load_masks(sizes: _Sizes, mine):
    return [m.load_shared(mine, offset=4 * m.WARPGROUP * i)[0] for i in range(sizes.passes)]


def _look_at_candidates(sizes: _Sizes, bins, scale, row, start, mine, shared):
    """Candidates, the upper halves of the thread's masks, are kept in the lower ones or dropped."""
    if sizes.has_scales:
        m.wait_copies(0)
    count, waiting = m.value(0), m.value(0)
    for i, mask in enumerate(_load_masks(sizes, mine)):
        candidates = m.right(mask, 16)
        count = m.add(count, m.count_ones(candidates))
        waiting = m.bit_or(waiting, m.select(m.less(0, candidates), 1 << i, 0))

    def look(_, carried):
        (waiting,) = carried
        taken = []
        for _ in range(CANDIDATES):
            waiting, *candidate = _take_candidate(sizes, mine, start, waiting)
            taken.append(candidate)
        known = [_bytes_and_scale(sizes, bins, scale, row, token, shared) for _, _, token in taken]
        margins = sizes.rule.load_margins(sizes.heads, shared)
        for (at, bit, _), of_token in zip(taken, known, strict=True):
            (mask,) = m.load_shared(at)
            m.store_shared(at, [m.bit_or(mask, m.select(is_kept(*of_token, margins), bit, 0))])
        return [waiting]

    m.loop(m.divide(m.add(count, CANDIDATES - 1), CANDIDATES), [waiting], look)


def _take_candidate(sizes: _Sizes, mine, start, waiting):
    """Take the first candidate out of the upper half of its mask. `waiting` has a bit for each pass with candidates.

    Returns:
      The bits of passes that have candidates still; the address of the mask; the candidate's bit there, 0 if there was
      none; and the token.
    """
    first = m.bit_and(waiting, m.subtract(0, waiting))
    # Where no pass has any, the last one has none either.
    i = m.minimum_signed(m.count_ones(m.subtract(first, 1)), sizes.passes - 1)
    at = _mask_of(mine, i)
    (mask,) = m.load_shared(at)
    candidates = m.right(mask, 16)
    bit = m.bit_and(candidates, m.subtract(0, candidates))
    m.store_shared(at, [m.bit_xor(mask, m.left(bit, 16))])
    waiting = m.select(m.less(bit, candidates), waiting, m.bit_xor(waiting, first))
    token = m.add(_token(start, i), m.count_ones(m.subtract(bit, 1)))
    return waiting, at, bit, m.minimum_signed(token, sizes.tokens - 1)


def _bytes_and_scale(sizes: _Sizes, bins, scale, row, token, shared):
    """The bytes of one of this thread's tokens, of each head in turn, and its scale."""
    if sizes.has_scales:
        word = m.right(m.bit_and(token, LANE_TOKENS - 1), 1)
        (pair,) = m.load_shared(m.add(_scales_of_thread(sizes, shared), m.left(word, 2)))
    else:
        place = m.add(m.multiply(row, sizes.tokens), token)
        (pair,) = m.load(m.address(scale, m.right(place, 1)))
    at = m.address(bins, word_of(row, token, 0, sizes.group, sizes.tokens))
    words = [m.load(at, offset=8 * head)[0] for head in range(sizes.group)]
    return [byte_of(word, token) for word in words], scale_of(pair, token)


def _places(sizes: _Sizes, masks, block, state, shared):
    """Where in the row's list each pass of this thread begins, and the block; and how many tokens it lists."""
    warp, lane = m.right(m.thread_index(), 5), m.bit_and(m.thread_index(), 31)
    totals, place_at = m.add(shared, 4 * sizes.totals_at), m.add(shared, 4 * sizes.place_at)
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
    return places, before, total


def _store_place(sizes: _Sizes, lane, block, state, place_at):
    """Tokens of all blocks before, for one warp to find: 32 blocks at a time."""

    def add(i, carried):
        other = m.add(m.multiply(i, 32), lane)
        is_before = m.less(other, block)
        # Lanes past the last block look at their own, which is done.
        published = m.wait_published(state.block(m.select(is_before, other, block)))
        return [m.add(carried[0], m.select(is_before, m.subtract(published, 1), 0))]

    (mine,) = m.loop(m.right(m.add(block, 31), 5), [m.value(0)], add)
    place = warp_sum(mine, m.add)
    m.when(m.less(lane, 1), lambda: m.store_shared(place_at, [place]))
