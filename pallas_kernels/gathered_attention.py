"""Exact attention of one token over a list of cached tokens per kv head, split evenly over all lists and combined.

    attend    program: an equal run of the tiles of all lists, one after the other ->  a part for each list in it:
              peak, total, out
    combine   program (kv head, query head, columns): all parts of a head, rescaled to the largest peak

A program that ends one list goes on with the next, so that the work is even however uneven the lists are: program p
writes its part of list r to place p + r, of which no two are the same. The query heads of a kv head are the rows of one
matrix product, padded to 16. Lists may be empty or hold every token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas

LEAST_ROWS = 16
TILE = 64
PROGRAMS = 512
LOWEST = -1e30
COMBINED_COLUMNS, COMBINED_PARTS = 32, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """Which program attends which tiles of R lists, numbered one list after the other.

    Attributes:
      row: int32 [power of two], numbers of lists; counts, ends: their tokens, and where the tiles of each end.
      each, more: tiles of a program; the first `more` programs have one more.
    """

    row: jax.Array
    counts: jax.Array
    ends: jax.Array
    each: jax.Array
    more: jax.Array

    @classmethod
    def of(cls, counts_ref, tile: int, programs: int) -> "_Split":
        rows = counts_ref.shape[0]
        row = jnp.arange(_pallas.power_of_two(rows), dtype=jnp.int32)
        counts = _pallas.load_masked(counts_ref, (row,), row < rows)
        tiles = pl.cdiv(counts, tile)
        total = jnp.sum(tiles)
        return cls(row=row, counts=counts, ends=jnp.cumsum(tiles), each=total // programs, more=total % programs)

    def start(self, program):
        """First tile of a program."""
        return program * self.each + jnp.minimum(program, self.more)

    def program(self, tile):
        """The program that attends a tile."""
        longer = self.more * (self.each + 1)
        behind = self.more + (tile - longer) // jnp.maximum(self.each, 1)
        return jnp.where(tile < longer, tile // (self.each + 1), behind)

    def row_of(self, tile):
        """The list that a tile belongs to."""
        return jnp.sum((self.ends <= tile).astype(jnp.int32))

    def tiles_of(self, row):
        """The first tile of a list, and the one behind its last."""
        before = jnp.max(jnp.where(self.row < row, self.ends, 0))
        return before, jnp.maximum(before, self._at(row, self.ends))

    def count(self, row):
        return self._at(row, self.counts)

    def _at(self, row, numbers):
        return jnp.sum(jnp.where(self.row == row, numbers, 0))


def attend_lists(
    counts_ref, query_ref, keys_ref, values_ref, indices_ref, peak_ref, total_ref, out_ref,
    *, programs, tile, softmax_scale, observe=None,
):  # fmt: skip
    """counts [R], query [R,G,D], keys and values [R,T,D], indices [R,S] -> peak and total [N,M], out [N,M,Dp] of the
    parts, N = programs + R.

    Args:
      observe: of a list, what else to add up over its tokens, as an object: `start`, a tuple; `add(sums, logits
        [H,tile], tokens [tile], valid [tile])`, the next; `store(place, sums)`, of the part. H is G as a power of two.
    """
    group, head_dim = query_ref.shape[1:]
    rows, columns = product_shape(group, head_dim)
    heads, spread = spread_of(group)
    split = _Split.of(counts_ref, tile, programs)
    program = pl.program_id(0)
    start, stop = split.start(program), split.start(program + 1)
    dim = jax.lax.broadcasted_iota(jnp.int32, (tile, columns), 1)

    def load_rows(ref, head, index, valid):
        at = (head + 0 * dim, index[:, None] + 0 * dim, dim)
        return _pallas.load_masked(ref, at, valid[:, None] & (dim < head_dim))

    def attend_list(head, _):
        query = load_query(query_ref, keys_ref.dtype, head, spread=spread)
        count = split.count(head)
        first, last = split.tiles_of(head)
        observer = observe and observe(head)

        def attend_tile(i, state):
            (peak, total, out), sums = state
            slot = i * tile + jnp.arange(tile, dtype=jnp.int32)
            valid = slot < count
            index = _pallas.load_masked(indices_ref, (head + 0 * slot, slot), valid)
            logits = softmax_scale * _pallas.dot(query, load_rows(keys_ref, head, index, valid).T)
            if observer:
                of_heads = logits if spread == 1 else jnp.sum(logits.reshape(heads, spread, tile), axis=1)
                sums = observer.add(sums, of_heads, index, valid)
            # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
            logits = jnp.where(valid[None, :], jnp.where(logits == -jnp.inf, jnp.nan, logits), LOWEST)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
            decay = jnp.exp(peak - new_peak)
            weights = jnp.where(valid[None, :], jnp.exp(logits - new_peak[:, None]), 0.0)
            values = load_rows(values_ref, head, index, valid)
            out = out * decay[:, None] + _pallas.dot(weights.astype(values.dtype), values)
            return (new_peak, total * decay + jnp.sum(weights, axis=1), out), sums

        state = (
            jnp.full((rows,), LOWEST, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, columns), jnp.float32),
        )
        tiles = jnp.maximum(start, first) - first, jnp.minimum(stop, last) - first
        sums = observer.start if observer else ()
        (peak, total, out), sums = jax.lax.fori_loop(*tiles, attend_tile, (state, sums))
        place = program + head
        peak_ref[place, :], total_ref[place, :], out_ref[place, :, :] = peak, total, out
        if observer:
            observer.store(place, sums)

    first, last = split.row_of(start), split.row_of(stop - 1)
    jax.lax.fori_loop(first, jnp.where(start < stop, last + 1, first), attend_list, None)


def _combine_kernel(counts_ref, peak_ref, total_ref, partial_ref, *refs, programs, tile, group):
    """counts [R], peak and total [N,M], partial [N,M,Dp], and sums [N,J,H] if there are any -> out [C], some columns of
    a query head, zero if its list is empty; and the head's sums [J]."""
    head, query_head, some = (pl.program_id(axis) for axis in range(3))
    row = query_head * spread_of(group)[1]
    out_ref = refs[-1] if len(refs) == 1 else refs[1]
    split = _Split.of(counts_ref, tile, programs)
    first_tile, last_tile = split.tiles_of(head)
    first = split.program(first_tile)
    # The parts of an empty list were not written.
    parts = jnp.where(first_tile < last_tile, split.program(last_tile - 1) - first + 1, 0)
    columns = out_ref.shape[0]
    part = jnp.arange(COMBINED_PARTS, dtype=jnp.int32)
    column = some * columns + jax.lax.broadcasted_iota(jnp.int32, (COMBINED_PARTS, columns), 1)

    def add(i, state):
        peak, total, out = state
        valid = i * COMBINED_PARTS + part < parts
        place = head + first + i * COMBINED_PARTS + part
        peaks = _pallas.load_masked(peak_ref, (place, row + 0 * part), valid, LOWEST)
        totals = _pallas.load_masked(total_ref, (place, row + 0 * part), valid)
        at = (place[:, None] + 0 * column, row + 0 * column, column)
        partial = _pallas.load_masked(partial_ref, at, jnp.broadcast_to(valid[:, None], column.shape))
        new_peak = jnp.maximum(peak, jnp.max(peaks))
        decay, weight = jnp.exp(peak - new_peak), jnp.exp(peaks - new_peak)
        out = out * decay + jnp.sum(weight[:, None] * partial, axis=0)
        return new_peak, total * decay + jnp.sum(weight * totals), out

    state = jnp.float32(LOWEST), jnp.float32(0), jnp.zeros((columns,), jnp.float32)
    _, total, out = jax.lax.fori_loop(0, pl.cdiv(parts, COMBINED_PARTS), add, state)
    out_ref[...] = jnp.where(total == 0, 0.0, out / total).astype(out_ref.dtype)
    if len(refs) == 1:
        return

    @pl.when(some == 0)
    def _():
        partial_ref, _, sums_ref = refs
        kinds = sums_ref.shape[0]
        kind = jax.lax.broadcasted_iota(jnp.int32, (COMBINED_PARTS, kinds), 1)

        def add(i, sums):
            place = i * COMBINED_PARTS + part
            valid = jnp.broadcast_to((place < parts)[:, None], kind.shape)
            at = ((head + first + place)[:, None] + 0 * kind, kind, query_head + 0 * kind)
            return sums + jnp.sum(_pallas.load_masked(partial_ref, at, valid), axis=0)

        sums_ref[...] = jax.lax.fori_loop(0, pl.cdiv(parts, COMBINED_PARTS), add, jnp.zeros((kinds,), jnp.float32))


def product_shape(group, head_dim):
    """Rows and columns of query heads in a matrix product: powers of two of at least 16."""
    return tuple(max(LEAST_ROWS, _pallas.power_of_two(size)) for size in (group, head_dim))


def spread_of(group):
    """Query heads as a power of two, and how many rows of a product lie between one and the next: so they can be
    gathered to fewer rows by a sum."""
    heads = _pallas.power_of_two(group)
    return heads, max(1, LEAST_ROWS // heads)


def load_query(query_ref, dtype, *kv_head, spread=1):
    """Queries [G,D], or those of a kv head in [R,G,D], as every `spread`-th row of a product, zeros between them."""
    group, head_dim = query_ref.shape[-2:]
    row, dim = (jax.lax.broadcasted_iota(jnp.int32, product_shape(group, head_dim), axis) for axis in (0, 1))
    head = row // spread
    at = (*(index + 0 * row for index in kv_head), head, dim)
    real = (head * spread == row) & (head < group) & (dim < head_dim)
    return _pallas.load_masked(query_ref, at, real).astype(dtype)


def gathered_attention(query, keys, values, indices, counts, *, softmax_scale, dtype):
    """`rabitq_jax.gathered_attention.gathered_attention_reference`."""
    lists = query, keys, values, indices, counts
    return attend_and_combine(attend_lists, lists, name="gathered_attention", softmax_scale=softmax_scale, dtype=dtype)


def attend_and_combine(kernel, lists, others=(), *, name, softmax_scale, dtype, kinds=0):
    """Attention over lists, and sums over their tokens.

    Args:
      kernel: `attend_lists`, or one that adds up as well: of its references those of `others`, whole, follow the lists'
        own, and that of the parts' sums [N,kinds,H] comes last.
      lists: query [B,K,G,D], keys, values, indices and counts, as in `gathered_attention`.
      others: arrays.

    Returns:
      Output [B,K,G,D]; and, if there are kinds of sums, these too: float32 [B,K,G,kinds].
    """
    query, keys, values, indices, counts = lists
    batch, kv_heads, group, head_dim = query.shape
    heads = batch * kv_heads
    rows, columns = product_shape(group, head_dim)
    # A tile's keys and values must fit into shared memory, where float32 takes three times the room (see _pallas.dot).
    tile = _pallas.block_of(indices.shape[-1], TILE if columns * keys.dtype.itemsize <= 512 else TILE // 2)
    flat = [x.reshape(heads, *x.shape[2:]) for x in (counts, query, keys, values, indices)]
    programs = min(PROGRAMS, heads * (indices.shape[-1] // tile))
    parts = programs + heads
    sums_shape = [(parts, kinds, spread_of(group)[0])] if kinds else []
    partial = _pallas.call(
        functools.partial(kernel, programs=programs, tile=tile, softmax_scale=softmax_scale),
        name=name,
        grid=(programs,),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((parts, rows), (parts, rows), (parts, rows, columns), *sums_shape)
        ],
    )(*flat, *others)

    some = min(columns, COMBINED_COLUMNS)
    out = [pl.BlockSpec((None, None, some), lambda row, g, part: (row, g, part))]
    out_shape = [jax.ShapeDtypeStruct((heads, group, columns), dtype)]
    if kinds:
        out.append(pl.BlockSpec((None, None, kinds), lambda row, g, part: (row, g, 0)))
        out_shape.append(jax.ShapeDtypeStruct((heads, group, kinds), jnp.float32))
    out, *sums = _pallas.call(
        functools.partial(_combine_kernel, programs=programs, tile=tile, group=group),
        name="combine_parts",
        grid=(heads, group, columns // some),
        in_specs=[pl.BlockSpec(x.shape, functools.partial(_origin, x.ndim)) for x in (flat[0], *partial)],
        out_specs=out,
        out_shape=out_shape,
    )(flat[0], *partial)
    out, *sums = (x.reshape(batch, kv_heads, group, -1) for x in (out, *sums))
    return (out[..., :head_dim], *sums) if kinds else out[..., :head_dim]


def _origin(dimensions: int, *_):
    """The block of an array that is taken whole."""
    return (0,) * dimensions
