"""The end of a first round: outputs and sums of its parts added up, and what follows from the sums; for Hopper GPUs.

    block of outputs         some columns of 4 query heads, a warp each (mosaic_parts.py)
    block of certificates    4 query heads, a warp each: certificate, limits of a second round (mosaic_certificate.py)

The two kinds have nothing to do with each other, but for being one launch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import HEADS, State
from pallas_kernels.mosaic_certificate import (
    SUMMARY,
    certificate_of_parts,
    limits_of_second_round,
    load_sample,
    store_numbers,
    typical_deviation,
)
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.mosaic_parts import OutputOfParts, Parts, SumOfParts, columns_of
from pallas_kernels.mosaic_rules import load_limits
from pallas_kernels.mosaic_top_p_threshold import LaneBins

LANES = 32


def verify(
    partial, counts, scale, quantized, limits, state, *, group: int, head_dim: int, sink: int, rule: Rule, dtype
):  # fmt: skip
    """Outputs and certificates.

    Args:
      partial: ends, peaks, totals, outputs and sums of `mosaic_attention.attend`.
      counts: int32 [B,K].
      scale: bfloat16 [B,K,T]; quantized: int32 [B].
      limits: float32 [B,K,H,LIMITS], that the lists were made by.
      state: a reference, int32 [B,K,Z].
      dtype: of the output: float32, bfloat16 or float16.

    Returns:
      Output [B,K,G,D]; summary float32 [B,K,G,8], of `rabitq_jax.certificate.Round`; limits of a second round float32
      [B,K,H,LIMITS]; and int32 [B,K,H], 1 where a head is short, and 0 elsewhere. The last two are undefined in heads
      that are not real.
    """
    batch, kv_heads, heads = limits.shape[:3]
    rows = batch * kv_heads
    places, _, columns = partial[3].shape
    # Those that a list has as a rule: a block's each, and one that it shares.
    usual = (places - rows) // rows + 1
    sizes = _Sizes(
        kv_heads=kv_heads, rows=rows, group=group, heads=heads, tokens=scale.shape[-1], sink=sink, head_dim=head_dim,
        slices=-(-head_dim // columns_of(usual)), part_columns=columns, state_words=state.shape[-1], usual=usual,
        rule=rule, dtype=jnp.dtype(dtype).name,
    )  # fmt: skip
    return m.call(
        functools.partial(_kernel, sizes),
        name="verify",
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group, SUMMARY), jnp.float32),
            jax.ShapeDtypeStruct(limits.shape, jnp.float32),
            jax.ShapeDtypeStruct(limits.shape[:3], jnp.int32),
        ),
        blocks=rows * (heads // HEADS) * (sizes.slices + 1),
        shared_words=1,
    )(*partial, counts, scale, quantized, limits, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    kv_heads: int
    rows: int
    group: int
    heads: int
    tokens: int
    sink: int
    head_dim: int
    slices: int
    part_columns: int
    state_words: int
    usual: int
    rule: Rule
    dtype: str


def _kernel(
    sizes: _Sizes, ends, peaks, totals, outs, sums, counts, scale, quantized, limits, state, out, summary, lower, short,
    _shared,
):  # fmt: skip
    """ends [R,2], peaks and totals [N,H], outs [N,H,C], sums [N,H,KINDS], counts [R], scale [R,T], quantized [B],
    limits [R,H,LIMITS]; state [R,Z]; out [R,G,D], summary [R,G,8], lower [R,H,LIMITS], short [R,H]."""
    warp, lane = m.right(m.thread_index(), 5), m.bit_and(m.thread_index(), LANES - 1)
    # A row's heads, and in turn their columns and certificates.
    groups, kinds = sizes.heads // HEADS, sizes.slices + 1
    some = m.divide(m.block_index(), kinds)
    kind = m.subtract(m.block_index(), m.multiply(some, kinds))
    row = m.divide(some, groups)
    head = m.add(m.multiply(m.subtract(some, m.multiply(row, groups)), HEADS), warp)

    def run():
        first, last = m.load(m.address(ends, m.left(row, 1)), words=2)
        count = m.load(m.address(counts, row))[0]
        # Of an empty list no part says where its parts are.
        is_empty = m.less(count, 1)
        number = m.select(is_empty, 0, m.add(m.subtract(last, first), 1))
        parts = Parts(first=m.select(is_empty, 0, first), number=number, heads=sizes.heads, head=head)
        is_of_columns = m.less(kind, sizes.slices)

        def add_up_columns():
            of_parts = OutputOfParts(
                parts, peaks, totals, outs, columns=sizes.part_columns, usual=sizes.usual, lane=lane, dtype=sizes.dtype
            )
            place = m.multiply(m.add(m.multiply(row, sizes.group), head), sizes.head_dim)
            of_parts.store(m.multiply(kind, columns_of(sizes.usual)), out, place, sizes.head_dim)

        def conclude():
            # All that is needed is asked for before any of it is waited for.
            scored = m.load(m.address(quantized, m.divide(row, sizes.kv_heads)))[0]
            scored = m.maximum_signed(m.subtract(scored, sizes.sink), 0)
            mine = load_limits(limits, m.add(m.multiply(row, sizes.heads), head))
            first_token = m.multiply(row, sizes.tokens)
            of_parts = SumOfParts(parts, sums, usual=sizes.usual, lane=lane)
            sample = load_sample(lane, scale, first_token, scored, sink=sizes.sink, tokens=sizes.tokens)
            bins = None
            if sizes.rule.certified and sizes.rule.top_p < 1:
                bins = LaneBins.load(State(state, row, sizes.heads, sizes.state_words), head, lane, now=True)
            deviation = typical_deviation(sizes.rule, sample, mine[0])
            certificate, found = certificate_of_parts(sizes.rule, of_parts, mine, scored, deviation)
            second, is_short = limits_of_second_round(sizes.rule, lane, bins, scored, mine, certificate, deviation)
            numbers = [*certificate, found, m.to_float(count)]

            def store():
                store_numbers(numbers, summary, m.add(m.multiply(row, sizes.group), head))
                place = m.add(m.multiply(row, sizes.heads), head)
                store_numbers(second, lower, place)
                m.store(m.address(short, place), [is_short])

            m.when(m.less(lane, 1), store)

        m.when(is_of_columns, add_up_columns)
        m.when(m.negate(is_of_columns), conclude)

    m.when(m.less(head, sizes.group), run)
