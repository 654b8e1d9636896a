"""Gathered attention, and what its exact logits say of the tokens outside the lists.

    attend    as in gathered_attention.py; it hands out the logits of the listed tokens
    found     program, of one warp: tiles of lists, as numbers [query heads, tokens] -> sums of the terms below
    finish    program (kv head, query head, columns): the parts of a head; and one more a query head: the parts of its
              sums, and what follows from them

Sums are not made where logits are: there a head is one row of 16, most of which are padding. They are few numbers a
token behind many instructions, so that it takes many small programs to keep the device busy.

A token's estimate comes as a float32 score, or as the byte of `mosaic_score_bins`: its place in the bin is then taken
to be the middle, and a threshold is a bin's edge. The equations are those of rabitq_jax/certificate.py; the normal
distribution is Numerical Recipes' Chebyshev fit of erfc (relative error below 1.2e-7), since Triton has no erfc.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas
from pallas_kernels.debiased_mass import deviation
from pallas_kernels.gathered_attention import (
    Work,
    attend,
    by_query,
    by_row,
    combine_call,
    combine_columns,
    for_each_list,
    parts_of,
    whole,
)
from pallas_kernels.mosaic_score_bins import BINS, BINS_PER_NAT, LARGEST_DEVIATION

# Sums over the list's tokens that a query head found itself, but for the first two; see `verified_attention`.
KINDS = 8
TILE, PROGRAMS, WARPS = 64, 2048, 1
# Below LARGEST_DEVIATION by more than rounding.
SURE_DEVIATION = LARGEST_DEVIATION * (1 - 1e-5)
ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277,
)  # fmt: skip


def normal_cdf(x):
    """Phi(x) and Phi(-x), float32, with a small relative error wherever they are normal numbers."""
    z = jnp.abs(x) * math.sqrt(0.5)
    # A reciprocal, by the fast instruction.
    t = jnp.square(jax.lax.rsqrt(1 + 0.5 * z))
    fit = jnp.full_like(t, ERFC[-1])
    for coefficient in ERFC[-2::-1]:
        fit = fit * t + coefficient
    tail = 0.5 * t * jnp.exp(fit - z * z)
    return jnp.where(x < 0, tail, 1 - tail), jnp.where(x < 0, 1 - tail, tail)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Constants:
    kv_heads: int
    sink: int
    deviations: float
    least_deviation: float
    far: float
    largest_log: float


def _found_kernel(
    counts_ref, indices_ref, logits_ref, quantized_ref, limits_ref, scale_ref, estimates_ref, ends_ref, sums_ref,
    *, work: Work, constants: _Constants,
):  # fmt: skip
    """counts [R], indices [R,S], logits [R,G,S], quantized [B], limits [R,H,J], scale [R,T], estimates [R,G,T] of
    scores or [R,G,T/4] of bins -> places of the lists' first and last parts [R,2], sums [N,KINDS,H] of the parts."""

    def sum_list(head, place, count, first, stop):
        found = _Found(constants, head, quantized_ref, limits_ref, scale_ref, estimates_ref)

        def sum_tile(i, sums):
            slot = i * work.tile + jnp.arange(work.tile, dtype=jnp.int32)
            valid = slot < count
            token = _pallas.load_masked(indices_ref, (head + 0 * slot, slot), valid)
            row = found.row[:, None] + 0 * slot[None, :]
            at = (head + 0 * row, row, slot[None, :] + 0 * row)
            valid_row = valid[None, :] & (row < found.group)
            return found.add(sums, _pallas.load_masked(logits_ref, at, valid_row), token, valid)

        zero = jnp.zeros((found.row.shape[0], work.tile), jnp.float32)
        for i, total in enumerate(jax.lax.fori_loop(first, stop, sum_tile, (zero,) * KINDS)):
            sums_ref[place, i, :] = jnp.sum(total, axis=1)

    for_each_list(counts_ref, ends_ref, work, sum_list)


class _Found:
    """Terms of the tokens that a kv head's query heads found, each its own."""

    def __init__(self, constants: _Constants, head, quantized_ref, limits_ref, scale_ref, estimates_ref):
        self.constants, self.head = constants, head
        self.scale_ref, self.estimates_ref = scale_ref, estimates_ref
        self.group = estimates_ref.shape[1]
        self.row = jnp.arange(_pallas.power_of_two(self.group), dtype=jnp.int32)
        self.quantized = quantized_ref[head // constants.kv_heads]
        number = 4 if estimates_ref.dtype == jnp.float32 else 5
        self.noise, self.peak, *self.limits = (self._limit(limits_ref, i) for i in range(number))

    def _limit(self, limits_ref, i):
        at = (self.head + 0 * self.row, self.row, i + 0 * self.row)
        return _pallas.load_masked(limits_ref, at, self.row < self.group)[:, None]

    def add(self, sums, true, token, valid):
        """The sums with those of a tile: exact logits [H,tile] of tokens [tile]."""
        constants = self.constants
        scale = _pallas.load_masked(self.scale_ref, (self.head + 0 * token, token), valid)
        sd = deviation(self.noise, scale[None, :], constants.least_deviation)
        valid = valid[None, :] & (self.row < self.group)[:, None]
        noisy, threshold, bulk = self._estimate(token, scale, sd, valid)
        scored = valid & ((token >= constants.sink) & (token < self.quantized))[None, :]
        found = scored & ~((noisy < threshold) & (noisy > -jnp.inf))

        weight = jnp.exp(jnp.minimum(true - self.peak, constants.largest_log))
        tau = jnp.clip((threshold - true) / sd, -2 * constants.far, 2 * constants.far)
        density = jnp.exp(-0.5 * tau * tau) * (1 / math.sqrt(2 * math.pi))
        under, over = normal_cdf(tau)
        over_found = 1 / over
        h0, h1, h2 = (x * over_found for x in (under, normal_cdf(tau - sd)[0], normal_cdf(tau - 2 * sd)[0]))
        hazard = density * over_found
        near = found & (tau > -constants.far)
        missed = jnp.where(near, weight * (h0 - h1), 0.0)
        spread = jnp.where(near, weight * jnp.maximum(h0 - 2 * h1 + jnp.exp(sd * sd) * h2, 0.0), 0.0)
        sure = near & (tau < 0.5) & (noisy < jnp.inf)
        below = found & (noisy - sd * sd < bulk)
        terms = (
            jnp.where(valid, weight, 0.0),
            jnp.where(found | (valid & ~scored), weight, 0.0),
            missed,
            missed * missed + weight * spread,
            jnp.where(sure, 1 + tau * hazard - hazard * hazard, 0.0),
            jnp.where(sure, (noisy - true) / sd - hazard, 0.0),
            jnp.where(below, jnp.exp(noisy - 0.5 * sd * sd - self.peak), 0.0),
            jnp.where(found, 1.0, 0.0),
        )
        return tuple(old + term for old, term in zip(sums, terms, strict=True))

    def _estimate(self, token, scale, sd, valid):
        """Noisy logits [H,tile], the tokens' own thresholds, and the one of the bulk [H,1]."""
        row, deviations = self.row[:, None] + 0 * token[None, :], self.constants.deviations
        token = token[None, :] + 0 * row
        if self.estimates_ref.dtype == jnp.float32:
            bulk, single = self.limits
            noisy = _pallas.load_masked(self.estimates_ref, (self.head + 0 * row, row, token), valid)
            return noisy, jnp.minimum(bulk, single - deviations * sd), bulk
        base, kept, depth = self.limits
        word = _pallas.load_masked(self.estimates_ref, (self.head + 0 * row, row, token // 4), valid)
        bin_ = ((word >> (token % 4 * 8)) & (BINS - 1)).astype(jnp.float32)
        width = 1 / BINS_PER_NAT
        # Where the best bin's scores are is not known: anywhere above its edge.
        noisy = jnp.where(bin_ == 0, jnp.inf, base - width * (bin_ + 0.5))
        kept_of_token = kept_bins(
            kept, depth, BINS_PER_NAT * deviations * self.noise, scale[None, :].astype(jnp.float32)
        )
        # What has too large a deviation to be counted is kept whatever its score, and stands for no token that was not.
        always = (kept_of_token == BINS) | (sd > SURE_DEVIATION)
        threshold = jnp.where(always, -jnp.inf, base - width * kept_of_token)
        return noisy, threshold, jnp.where(kept == BINS, -jnp.inf, base - width * kept)


def kept_bins(kept, depth, depth_gain, scale):
    """How many of the best bins a token is kept in: those of the bulk, or those whose scores could be those of a single
    token of great weight, `depth + depth_gain * scale` bins below base; all float32."""
    return jnp.maximum(kept, jnp.floor(jnp.clip(depth + depth_gain * scale, 0, BINS - 1)) + 1)


def _finish_kernel(
    count_ref, ends_ref, peak_ref, total_ref, partial_ref, found_ends_ref, sums_ref, *refs,
    work: Work, found_work: Work, conclude,
):  # fmt: skip
    """As `combine_columns`; and found_ends [2], sums [N,KINDS,H] of the parts, what `conclude` looks at -> out [C], and
    what it finds of a query head."""
    *known_refs, out_ref, found_ref = refs
    head, some = pl.program_id(1), pl.program_id(2)
    last = pl.num_programs(2) - 1

    @pl.when(some < last)
    def _():
        combine_columns(head, some, count_ref, ends_ref, peak_ref, total_ref, partial_ref, out_ref, work)

    @pl.when(some == last)
    def _():
        first, parts = parts_of(count_ref, found_ends_ref)
        at_once = found_work.combined_parts
        part = jnp.arange(at_once, dtype=jnp.int32)

        def add(i, sums):
            place = i * at_once + part
            at = lambda kind: (first + place, kind + 0 * place, head + 0 * place)  # noqa: E731
            loads = (_pallas.load_masked(sums_ref, at(kind), place < parts) for kind in range(KINDS))
            return tuple(old + jnp.sum(new) for old, new in zip(sums, loads, strict=True))

        sums = jax.lax.fori_loop(0, pl.cdiv(parts, at_once), add, (jnp.float32(0),) * KINDS)
        numbers = conclude(head, sums, *known_refs) if conclude else sums
        for i, number in enumerate(numbers):
            found_ref[i] = number


def verified_attention(
    query, keys, values, indices, counts, estimates, scale, quantized, limits,
    *, softmax_scale, sink, deviations, least_deviation, far, largest_log, conclude=None, known=(), numbers=KINDS,
):  # fmt: skip
    """`rabitq_jax.verified_attention.verified_attention_reference`.

    Args:
      query, keys, values, indices, counts: as in `gathered_attention`.
      estimates: scores float32 [B,K,G,T], or bins int32 [B,K,G,T/4] of `mosaic_score_bins`.
      scale: bfloat16 [B,K,T].
      quantized: int32 [B].
      limits: float32 [B,K,H,J], H from G on, of each query head: noise and peak; then for scores the thresholds bulk
        and single; for bins base, how many bins the bulk keeps, and the depth of the single threshold in bins.
      conclude: function of a query head's number in its group, its sums (below), and references to what is `known` of
        it, to the float32 numbers that follow; None for the sums themselves.
      known: pairs of an array and the `BlockSpec` of its part, for programs (kv head, query head, columns).
      numbers: how many `conclude` finds, a power of two.

    Returns:
      Output float32 [B,K,G,D], and float32 [B,K,G,numbers] what `conclude` finds. Sums are in units of e^peak: the mass
      attended; the mass of the head's own tokens; missed, variance, information, score, returned and number of
      `rabitq_jax.certificate.Found`.
    """
    constants = _Constants(
        kv_heads=query.shape[1], sink=sink, deviations=deviations, least_deviation=least_deviation, far=far,
        largest_log=largest_log,
    )  # fmt: skip
    work, (*partial, logits) = attend(
        query, keys, values, indices, counts, softmax_scale=softmax_scale, with_logits=True
    )
    rows = _pallas.power_of_two(query.shape[2])
    lists, tokens = counts.size, indices.shape[-1]
    found_work = Work.split(lists, tokens, tile=_pallas.block_of(tokens, TILE), programs=PROGRAMS)
    found = _pallas.call(
        functools.partial(_found_kernel, work=found_work, constants=constants),
        name="found_tokens",
        num_warps=WARPS,
        grid=(found_work.programs,),
        out_shape=[
            jax.ShapeDtypeStruct((lists, 2), jnp.int32),
            jax.ShapeDtypeStruct((found_work.parts, KINDS, rows), jnp.float32),
        ],
    )(by_row(counts), by_row(indices), logits, quantized, *(by_row(x) for x in (limits, scale, estimates)))

    grid, in_specs, out_spec, out_shape = combine_call(counts, query.shape, partial, dtype=jnp.float32)
    out, concluded = _pallas.call(
        functools.partial(_finish_kernel, work=work, found_work=found_work, conclude=conclude),
        name="combine_parts",
        grid=(*grid[:2], grid[2] + 1),
        in_specs=[*in_specs, in_specs[1], whole(found[1]), *(spec for _, spec in known)],
        out_specs=[out_spec, pl.BlockSpec((None, None, numbers), lambda row, g, part: (row, g, 0))],
        out_shape=[out_shape, jax.ShapeDtypeStruct((lists, query.shape[2], numbers), jnp.float32)],
    )(by_row(counts), *partial, *found, *(array for array, _ in known))
    return by_query(out, query.shape), concluded.reshape(*query.shape[:3], numbers)
