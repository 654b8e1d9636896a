"""Exact attention of one token over a list of cached tokens per kv head, on the tensor core; for Hopper GPUs.

    block     an equal run of the tiles of all lists, one after the other -> a part for each list in it
    warp      16 places of each of its tiles (mosaic_warp_attention.py)

As in gathered_attention.py, a block that ends one list goes on with the next, so that the work is even however uneven
the lists are: block p writes its part of list r to place p + r, of which no two are the same. Where the tokens were
found by scores with noise, the parts have sums over them (mosaic_found.py) besides.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.gathered_attention import Work, by_row, combine
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.mosaic_found import KINDS
from pallas_kernels.mosaic_top_p_threshold import warp_sum
from pallas_kernels.mosaic_warp_attention import PLACES, WARPS, Sizes, WarpAttention, takes

__all__ = ["Known", "attend", "gathered_attention", "takes"]

# Blocks that are on the device at once.
BLOCKS = 264
TILE = PLACES * WARPS
LANES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """How listed tokens were found: arrays as `mosaic_compact.compact_noisy` takes and gives them."""

    bins: jax.Array
    scale: jax.Array
    quantized: jax.Array
    limits: jax.Array
    rule: Rule
    sink: int

    @property
    def arrays(self):
        return by_row(self.bins), by_row(self.scale), by_row(self.limits), self.quantized


def gathered_attention(query, keys, values, indices, counts, *, softmax_scale, dtype):
    """`rabitq_jax.gathered_attention.gathered_attention_reference`.

    Raises:
      NotImplementedError: `takes` is False.
    """
    work, partial = attend(query, keys, values, indices, counts, softmax_scale=softmax_scale)
    return combine(work, counts, query.shape, partial, dtype=dtype)


def attend(query, keys, values, indices, counts, *, softmax_scale: float, known: Known | None = None):
    """Parts of attention over lists.

    Args:
      query: [B,K,G,D]; keys, values: [B,K,T,D], bfloat16 or float16; indices: int32 [B,K,S]; counts: int32 [B,K].
      known: asks for sums.

    Returns:
      Work, for `gathered_attention.combine`; and places of the lists' first and last parts int32 [R,2]; peaks and
      totals float32 [N,H], outputs float32 [N,H,C], and if asked for sums float32 [N,H,KINDS] of the parts.

    Raises:
      NotImplementedError: `takes` is False.
    """
    batch, kv_heads, group, head_dim = query.shape
    dtype, rows, places = keys.dtype.name, batch * kv_heads, indices.shape[2]
    if not takes(group, head_dim, dtype):
        raise NotImplementedError(
            "the kernel takes bfloat16 and float16, groups of up to 16 heads, and head dimensions that are multiples "
            f"of 8 up to 256 (128 from 9 heads on), got {dtype}, {group} heads of {head_dim}"
        )
    work = Work.split(rows, places, tile=TILE, programs=BLOCKS)
    sizes = Sizes(
        kv_heads=kv_heads, rows=rows, group=group, tokens=keys.shape[2], head_dim=head_dim, dtype=dtype,
        softmax_scale=softmax_scale, sink=known.sink if known else 0, rule=known.rule if known else None,
    )  # fmt: skip
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    part = (work.parts, sizes.heads)
    sums = (f32((*part, KINDS)),) if known else ()
    arrays = query.astype(keys.dtype), keys, values, indices, counts
    return work, m.call(
        functools.partial(_kernel, sizes, work.programs, places),
        name="gathered_attention",
        out_type=(
            jax.ShapeDtypeStruct((rows, 2), jnp.int32), f32(part), f32(part), f32((*part, sizes.columns)), *sums
        ),
        blocks=work.programs,
        shared_words=sizes.shared_words,
    )(*map(by_row, arrays), *(known.arrays if known else ()))  # fmt: skip


def _kernel(sizes: Sizes, blocks: int, places: int, query, keys, values, indices, counts, *refs):
    """query [R,G,D], keys and values [R,T,D], indices [R,S], counts [R]; and where sums are made bins [R,T/8,G,2],
    scale [R,T], limits [R,H,LIMITS], quantized [B] -> ends [R,2], peaks and totals [N,H], outs [N,H,C], sums
    [N,H,KINDS]; shared memory: of `WarpAttention`."""
    known, refs = (refs[:4], refs[4:]) if sizes.rule else ((), refs)
    ends, *parts, shared = refs
    lane, shared = m.bit_and(m.thread_index(), LANES - 1), m.shared_address(shared)
    start, stop = _share_of_block(sizes, blocks, lane, counts)

    def attention(row) -> WarpAttention:
        if not known:
            return WarpAttention(sizes, lane, row, query, keys, values, shared)
        bins, scale, limits, quantized = known
        scored = m.load(m.address(quantized, m.divide(row, sizes.kv_heads)))[0]
        scored = m.maximum_signed(m.subtract(scored, sizes.sink), 0)
        return WarpAttention(
            sizes, lane, row, query, keys, values, shared, bins=bins, scale=scale, limits=limits, scored=scored
        )  # fmt: skip

    def attend_list(row, begin, count):
        """The block's tiles of a list, of which tile `begin` is the first."""
        end = m.add(begin, _tiles(count))
        part = m.add(m.block_index(), row)
        is_first_thread = m.less(m.thread_index(), 1)
        for i, condition in enumerate((m.not_less(begin, start), m.not_less(stop, end))):
            m.store(m.address(ends, m.left(row, 1)), [part], offset=4 * i, where=m.both(is_first_thread, condition))
        first = m.subtract(m.maximum_signed(start, begin), begin)
        last = m.subtract(m.minimum_signed(stop, end), begin)
        mine = attention(row)
        first_index = m.multiply(row, places)
        listed = lambda place: m.load(m.address(indices, m.add(first_index, place)))[0]  # noqa: E731
        progress = mine.attend(
            m.multiply(first, TILE), m.minimum_signed(count, m.multiply(last, TILE)), listed, mine.start()
        )
        mine.share(progress)
        m.barrier()
        mine.add_up_warps(part, *parts)
        # The shared memory makes way for the next list.
        m.barrier()

    def look_at_rows(i, carried):
        row, count, through = _lists(sizes, lane, counts, i, carried[0])
        begin = m.subtract(through, _tiles(count))
        is_mine = m.both(m.less(begin, stop), m.both(m.less(start, through), m.less(0, count)))

        def attend_next(_, carried):
            (rest,) = carried
            lowest = m.bit_and(rest, m.subtract(0, rest))
            which = m.count_ones(m.subtract(lowest, 1))
            attend_list(*(m.shuffle(x, which) for x in (row, begin, count)))
            return [m.bit_xor(rest, lowest)]

        marks = m.ballot(is_mine)
        m.loop(m.count_ones(marks), [marks], attend_next)
        return [m.shuffle(through, LANES - 1)]

    m.loop(-(-sizes.rows // LANES), [m.value(0)], look_at_rows)


def _tiles(count):
    return m.divide(m.add(count, TILE - 1), TILE)


def _lists(sizes: Sizes, lane, counts, i, before):
    """Of 32 lists, one a lane: row, tokens, and tiles of all lists up to it; `before` of those before the 32."""
    row = m.add(m.multiply(i, LANES), lane)
    count = m.load(m.address(counts, m.minimum_signed(row, sizes.rows - 1)))[0]
    count = m.select(m.less(row, sizes.rows), count, 0)
    through = _tiles(count)
    for lanes in (1, 2, 4, 8, 16):
        through = m.select(m.less(lane, lanes), through, m.add(through, m.shuffle_up(through, lanes)))
    return row, count, m.add(through, before)


def _share_of_block(sizes: Sizes, blocks: int, lane, counts):
    """The first tile of this block, and that behind its last, of all lists one after the other."""

    def add(i, carried):
        row = m.add(m.multiply(i, LANES), lane)
        count = m.load(m.address(counts, m.minimum_signed(row, sizes.rows - 1)))[0]
        return [m.add(carried[0], m.select(m.less(row, sizes.rows), _tiles(count), 0))]

    (tiles,) = m.loop(-(-sizes.rows // LANES), [m.value(0)], add)
    tiles = warp_sum(tiles, m.add)
    each = m.divide(tiles, blocks)
    more = m.subtract(tiles, m.multiply(each, blocks))
    start = m.add(m.multiply(m.block_index(), each), m.minimum_signed(m.block_index(), more))
    return start, m.add(m.add(start, each), m.select(m.less(m.block_index(), more), 1, 0))
