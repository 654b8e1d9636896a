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


def for_each_list(counts_ref, work: "Work", body, ends_ref=None):
    """Run `body(head, place, count, first, stop)` for the lists of this program: the place of its part, the list's
    tokens, and the tiles of the list that are this program's. The places of a list's first and last parts go to
    `ends_ref` [R,2], if there is one."""
    split = _Split.of(counts_ref, work.tile, work.programs)
    program = pl.program_id(0)
    start, stop = split.start(program), split.start(program + 1)

    def one_list(head, _):
        begin, end = split.tiles_of(head)
        place = program + head
        if ends_ref is not None:
            _store_where(start <= begin, ends_ref, (head, 0), place)
            _store_where(stop >= end, ends_ref, (head, 1), place)
        body(head, place, split.count(head), jnp.maximum(start, begin) - begin, jnp.minimum(stop, end) - begin)

    first, last = split.row_of(start), split.row_of(stop - 1)
    jax.lax.fori_loop(first, jnp.where(start < stop, last + 1, first), one_list, None)


def _store_where(condition, ref, index, x):
    @pl.when(condition)
    def _():
        ref[index] = x


def _attend_kernel(
    counts_ref, query_ref, keys_ref, values_ref, indices_ref, ends_ref, peak_ref, total_ref, out_ref, logits_ref=None,
    *, work, softmax_scale,
):  # fmt: skip
    """counts [R], query [R,G,D], keys and values [R,T,D], indices [R,S] -> places of the lists' first and last parts
    [R,2], peak and total [N,M], out [N,M,Dp] of the parts; and, if asked for, the logits [R,G,S] of the lists' tokens.
    """
    group, head_dim = query_ref.shape[1:]
    rows, columns = product_shape(group, head_dim)
    tile = work.tile
    dim = jax.lax.broadcasted_iota(jnp.int32, (tile, columns), 1)

    def load_rows(ref, head, index, valid):
        at = (head + 0 * dim, index[:, None] + 0 * dim, dim)
        return _pallas.load_masked(ref, at, valid[:, None] & (dim < head_dim))

    def attend_list(head, place, count, first, stop):
        query = load_query(query_ref, keys_ref.dtype, head)

        def attend_tile(i, state):
            peak, total, out = state
            slot = i * tile + jnp.arange(tile, dtype=jnp.int32)
            valid = slot < count
            index = _pallas.load_masked(indices_ref, (head + 0 * slot, slot), valid)
            logits = softmax_scale * _pallas.dot(query, load_rows(keys_ref, head, index, valid).T)
            # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
            logits = jnp.where(valid[None, :], jnp.where(logits == -jnp.inf, jnp.nan, logits), LOWEST)
            if logits_ref is not None:
                row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, tile), axis) for axis in (0, 1))
                listed = (row < group) & valid[None, :]
                _pallas.store_masked(logits_ref, (head + 0 * row, row, i * tile + column), logits, listed)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
            decay = jnp.exp(peak - new_peak)
            weights = jnp.where(valid[None, :], jnp.exp(logits - new_peak[:, None]), 0.0)
            values = load_rows(values_ref, head, index, valid)
            out = out * decay[:, None] + _pallas.dot(weights.astype(values.dtype), values)
            return new_peak, total * decay + jnp.sum(weights, axis=1), out

        state = (
            jnp.full((rows,), LOWEST, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, columns), jnp.float32),
        )
        peak_ref[place, :], total_ref[place, :], out_ref[place, :, :] = jax.lax.fori_loop(
            first, stop, attend_tile, state
        )

    for_each_list(counts_ref, work, attend_list, ends_ref)


def _combine_kernel(count_ref, ends_ref, peak_ref, total_ref, partial_ref, out_ref, *, work):
    """`combine_columns`, of programs (list, query head, columns)."""
    row, some = pl.program_id(1), pl.program_id(2)
    combine_columns(row, some, count_ref, ends_ref, peak_ref, total_ref, partial_ref, out_ref, work)


def combine_columns(row, some, count_ref, ends_ref, peak_ref, total_ref, partial_ref, out_ref, work: "Work"):
    """count [], ends [2], peak and total [N,M], partial [N,M,Dp] -> out [C], some columns of a list's query head, zero
    if the list is empty."""
    columns, at_once = out_ref.shape[0], work.combined_parts
    first, parts = parts_of(count_ref, ends_ref)
    part = jnp.arange(at_once, dtype=jnp.int32)
    column = some * columns + jax.lax.broadcasted_iota(jnp.int32, (at_once, columns), 1)

    def add(i, state):
        peak, total, out = state
        valid = i * at_once + part < parts
        place = first + i * at_once + part
        peaks = _pallas.load_masked(peak_ref, (place, row + 0 * part), valid, LOWEST)
        totals = _pallas.load_masked(total_ref, (place, row + 0 * part), valid)
        at = (place[:, None] + 0 * column, row + 0 * column, column)
        partial = _pallas.load_masked(partial_ref, at, jnp.broadcast_to(valid[:, None], column.shape))
        new_peak = jnp.maximum(peak, jnp.max(peaks))
        decay, weight = jnp.exp(peak - new_peak), jnp.exp(peaks - new_peak)
        out = out * decay + jnp.sum(weight[:, None] * partial, axis=0)
        return new_peak, total * decay + jnp.sum(weight * totals), out

    state = jnp.float32(LOWEST), jnp.float32(0), jnp.zeros((columns,), jnp.float32)
    _, total, out = jax.lax.fori_loop(0, pl.cdiv(parts, at_once), add, state)
    out_ref[...] = jnp.where(total == 0, 0.0, out / total).astype(out_ref.dtype)


def parts_of(count_ref, ends_ref):
    """The place of a list's first part, and how many it has: those of an empty list were not written."""
    first = ends_ref[0]
    return first, jnp.where(count_ref[...] > 0, ends_ref[1] - first + 1, 0)


def product_shape(group, head_dim):
    """Rows and columns of query heads in a matrix product: powers of two of at least 16."""
    return tuple(max(LEAST_ROWS, _pallas.power_of_two(size)) for size in (group, head_dim))


def load_query(query_ref, dtype, *kv_head):
    """Queries [G,D], or those of a kv head in [R,G,D], as the rows of a product, zeros behind them."""
    group, head_dim = query_ref.shape[-2:]
    row, dim = (jax.lax.broadcasted_iota(jnp.int32, product_shape(group, head_dim), axis) for axis in (0, 1))
    at = (*(index + 0 * row for index in kv_head), row, dim)
    return _pallas.load_masked(query_ref, at, (row < group) & (dim < head_dim)).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How lists are split: tokens of a tile, programs, and parts N, one a program and list at most."""

    tile: int
    programs: int
    parts: int

    @classmethod
    def split(cls, lists: int, tokens: int, *, tile: int, programs: int) -> "Work":
        """Lists of up to so many tokens."""
        programs = min(programs, lists * pl.cdiv(tokens, tile))
        return cls(tile=tile, programs=programs, parts=programs + lists)

    @property
    def combined_parts(self) -> int:
        """Parts combined at a time: those that a list has as a rule."""
        each = self.programs // (self.parts - self.programs) + 2
        return min(_pallas.power_of_two(each), COMBINED_PARTS)


def gathered_attention(query, keys, values, indices, counts, *, softmax_scale, dtype):
    """`rabitq_jax.gathered_attention.gathered_attention_reference`."""
    work, partial = attend(query, keys, values, indices, counts, softmax_scale=softmax_scale, with_logits=False)
    return combine(work, counts, query.shape, partial, dtype=dtype)


def attend(query, keys, values, indices, counts, *, softmax_scale, with_logits):
    """Returns Work, and for `combine` where each list's parts are, and their peaks, totals and outputs; then, if asked
    for, the listed tokens' logits in the lists' order, float32 [R,G,S]."""
    batch, kv_heads, group, head_dim = query.shape
    heads = batch * kv_heads
    rows, columns = product_shape(group, head_dim)
    # A tile's keys and values must fit into shared memory, where float32 takes three times the room (see _pallas.dot).
    tile = _pallas.block_of(indices.shape[-1], TILE if columns * keys.dtype.itemsize <= 512 else TILE // 2)
    work = Work.split(heads, indices.shape[-1], tile=tile, programs=PROGRAMS)
    shapes = [(work.parts, rows), (work.parts, rows), (work.parts, rows, columns)]
    shapes += [(heads, group, indices.shape[-1])] * with_logits
    return work, _pallas.call(
        functools.partial(_attend_kernel, work=work, softmax_scale=softmax_scale),
        name="gathered_attention",
        grid=(work.programs,),
        out_shape=[
            jax.ShapeDtypeStruct((heads, 2), jnp.int32),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        ],
    )(*(by_row(x) for x in (counts, query, keys, values, indices)))


def by_row(x):
    """An array [B,K,...] as [R,...]."""
    return x.reshape(-1, *x.shape[2:])


def combine(work: Work, counts, shape, partial, *, dtype):
    """Output [B,K,G,D] of queries of a shape."""
    grid, in_specs, out_spec, out_shape = combine_call(counts, shape, partial, dtype=dtype)
    out = _pallas.call(
        functools.partial(_combine_kernel, work=work),
        name="combine_parts",
        grid=grid,
        in_specs=in_specs,
        out_specs=out_spec,
        out_shape=out_shape,
    )(by_row(counts), *partial)
    return by_query(out, shape)


def combine_call(counts, shape, partial, *, dtype):
    """Grid (list, query head, columns), and specs and shape of the output, for `combine_columns`."""
    group, columns = shape[2], partial[-1].shape[-1]
    some = min(columns, COMBINED_COLUMNS)
    in_specs = [
        pl.BlockSpec((None,), lambda row, g, part: (row,)),
        pl.BlockSpec((None, 2), lambda row, g, part: (row, 0)),
        *(whole(x) for x in partial[1:]),
    ]
    last = columns // some - 1
    out_spec = pl.BlockSpec((None, None, some), lambda row, g, part: (row, g, jnp.minimum(part, last)))
    out_shape = jax.ShapeDtypeStruct((counts.size, group, columns), dtype)
    return (counts.size, group, columns // some), in_specs, out_spec, out_shape


def by_query(out, shape):
    """Combined columns as [B,K,G,D]."""
    return out.reshape(*shape[:3], -1)[..., : shape[3]]


def whole(x):
    """The spec of an array that is taken whole."""
    return pl.BlockSpec(x.shape, functools.partial(_origin, x.ndim))


def _origin(dimensions: int, *_):
    return (0,) * dimensions
