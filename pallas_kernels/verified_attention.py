"""Gathered attention, and what its exact logits say of the tokens outside the lists.

    attend    as in gathered_attention.py; it hands out the logits of the listed tokens
    found     program: the same tiles of lists, as numbers [query heads, tokens] -> sums of the terms below
    finish    program (kv head, query head, columns): the parts of a head; and one more a query head: the parts of its
              sums

Sums are not made where logits are: there a head is one row of 16, most of which are padding. The equations are those of
rabitq_jax/certificate.py; the normal distribution is Numerical Recipes' Chebyshev fit of erfc (relative error below
1.2e-7), since Triton has no erfc.
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

# Sums of a query head; see `verified_attention`.
KINDS = 8
ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277,
)  # fmt: skip


def normal_cdf(x):
    """Phi(x) and Phi(-x), float32, with a small relative error wherever they are normal numbers."""
    tail = _tail(x, 0.0)
    return jnp.where(x < 0, tail, 1 - tail), jnp.where(x < 0, 1 - tail, tail)


def tilted_normal_cdf(x, exponent):
    """e^exponent Phi(x), also where one factor is out of range and the product is not."""
    return jnp.where(x < 0, _tail(x, exponent), jnp.exp(exponent) * (1 - _tail(x, 0.0)))


def _tail(x, exponent):
    """e^exponent Phi(-|x|)."""
    z = jnp.abs(x) * math.sqrt(0.5)
    # A reciprocal, by the fast instruction.
    t = jnp.square(jax.lax.rsqrt(1 + 0.5 * z))
    fit = jnp.full_like(t, ERFC[-1])
    for coefficient in ERFC[-2::-1]:
        fit = fit * t + coefficient
    return 0.5 * t * jnp.exp(fit - z * z + exponent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Constants:
    kv_heads: int
    sink: int
    deviations: float
    least_deviation: float
    far: float
    largest_log: float


def _found_kernel(
    counts_ref, indices_ref, logits_ref, quantized_ref, limits_ref, scale_ref, scores_ref, sums_ref,
    *, work: Work, constants: _Constants,
):  # fmt: skip
    """counts [R], indices [R,S], logits [R,G,S], quantized [B], limits [R,G,4], scale [R,T], scores [R,G,T] -> sums
    [N,KINDS,H] of the parts."""

    def sum_list(head, place, count, first, stop):
        found = _Found(constants, head, quantized_ref, limits_ref, scale_ref, scores_ref)

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

    for_each_list(counts_ref, work, sum_list)


class _Found:
    """Terms of the tokens that a kv head's query heads found, each its own."""

    def __init__(self, constants: _Constants, head, quantized_ref, limits_ref, scale_ref, scores_ref):
        self.constants, self.head = constants, head
        self.scale_ref, self.scores_ref = scale_ref, scores_ref
        self.group = scores_ref.shape[1]
        self.row = jnp.arange(_pallas.power_of_two(self.group), dtype=jnp.int32)
        self.quantized = quantized_ref[head // constants.kv_heads]
        self.noise, self.peak, self.bulk, self.single = (self._limit(limits_ref, i) for i in range(4))

    def _limit(self, limits_ref, i):
        at = (self.head + 0 * self.row, self.row, i + 0 * self.row)
        return _pallas.load_masked(limits_ref, at, self.row < self.group)[:, None]

    def add(self, sums, true, token, valid):
        """The sums with those of a tile: exact logits [H,tile] of tokens [tile]."""
        constants = self.constants
        scale = _pallas.load_masked(self.scale_ref, (self.head + 0 * token, token), valid)
        sd = deviation(self.noise, scale[None, :], constants.least_deviation)
        valid = valid[None, :] & (self.row < self.group)[:, None]
        row = self.row[:, None] + 0 * token[None, :]
        noisy = _pallas.load_masked(self.scores_ref, (self.head + 0 * row, row, token[None, :] + 0 * row), valid)
        half_variance = 0.5 * sd * sd
        threshold = jnp.minimum(self.bulk - half_variance, self.single - constants.deviations * sd)
        scored = valid & ((token >= constants.sink) & (token < self.quantized))[None, :]
        found = scored & ~((noisy < threshold) & (noisy > -jnp.inf))

        weight = jnp.exp(jnp.minimum(true - self.peak, constants.largest_log))
        tau = jnp.clip((threshold - true) / sd, -2 * constants.far, 2 * constants.far)
        density = jnp.exp(-0.5 * tau * tau) * (1 / math.sqrt(2 * math.pi))
        under, over = normal_cdf(tau)
        over_found = 1 / over
        h0, h1 = (x * over_found for x in (under, normal_cdf(tau - sd)[0]))
        tilted_h2 = tilted_normal_cdf(tau - 2 * sd, sd * sd) * over_found
        hazard = density * over_found
        near = found & (tau > -constants.far)
        missed = jnp.where(near, weight * (h0 - h1), 0.0)
        spread = jnp.where(near, weight * jnp.maximum(h0 - 2 * h1 + tilted_h2, 0.0), 0.0)
        sure = near & (tau < 0.5) & (noisy < jnp.inf)
        debiased = noisy - half_variance
        terms = (
            jnp.where(valid, weight, 0.0),
            jnp.where(found | (valid & ~scored), weight, 0.0),
            missed,
            missed * missed + weight * spread,
            jnp.where(sure, 1 + tau * hazard - hazard * hazard, 0.0),
            jnp.where(sure, (noisy - true) / sd - hazard, 0.0),
            jnp.where(found & (debiased < self.bulk), jnp.exp(debiased - self.peak), 0.0),
            jnp.where(found, 1.0, 0.0),
        )
        return tuple(old + term for old, term in zip(sums, terms, strict=True))


def _finish_kernel(count_ref, ends_ref, peak_ref, total_ref, partial_ref, sums_ref, out_ref, found_ref, *, work: Work):
    """As `combine_columns`; and sums of the parts, [N,KINDS,H] in the places of the partial outputs -> out [C], and a
    query head's sums [KINDS]."""
    head, some = pl.program_id(1), pl.program_id(2)
    last = pl.num_programs(2) - 1

    @pl.when(some < last)
    def _():
        combine_columns(head, some, count_ref, ends_ref, peak_ref, total_ref, partial_ref, out_ref, work)

    @pl.when(some == last)
    def _():
        kind = jnp.arange(KINDS)
        first, number = parts_of(count_ref, ends_ref)

        def add(i, sums):
            part = i * work.combined_parts + jnp.arange(work.combined_parts)[:, None] + 0 * kind[None]
            at = first + part, kind[None] + 0 * part, head + 0 * part
            return sums + jnp.sum(_pallas.load_masked(sums_ref, at, part < number), axis=0)

        zero = jnp.zeros((KINDS,), jnp.float32)
        found_ref[...] = jax.lax.fori_loop(0, pl.cdiv(number, work.combined_parts), add, zero)


def verified_attention(
    query, keys, values, indices, counts, scores, scale, quantized, limits,
    *, softmax_scale, sink, deviations, least_deviation, far, largest_log,
):  # fmt: skip
    """`rabitq_jax.verified_attention.verified_attention_reference`.

    Args:
      query, keys, values, indices, counts: as in `gathered_attention`.
      scores: float32 [B,K,G,T].
      scale: bfloat16 [B,K,T].
      quantized: int32 [B].
      limits: float32 [B,K,G,4]: noise, peak, and the thresholds bulk and single.

    Returns:
      Output float32 [B,K,G,D], and sums float32 [B,K,G,KINDS] in units of e^peak: the mass attended; the mass of the
      head's own tokens; missed, variance, information, score, returned and number of `rabitq_jax.certificate.Found`.
    """
    constants = _Constants(
        kv_heads=query.shape[1], sink=sink, deviations=deviations, least_deviation=least_deviation, far=far,
        largest_log=largest_log,
    )  # fmt: skip
    work, (*partial, logits) = attend(
        query, keys, values, indices, counts, softmax_scale=softmax_scale, with_logits=True
    )
    rows = _pallas.power_of_two(query.shape[2])
    sums = _pallas.call(
        functools.partial(_found_kernel, work=work, constants=constants),
        name="found_tokens",
        grid=(work.programs,),
        out_shape=jax.ShapeDtypeStruct((work.parts, KINDS, rows), jnp.float32),
    )(by_row(counts), by_row(indices), logits, quantized, *(by_row(x) for x in (limits, scale, scores)))
    grid, in_specs, out_spec, out_shape = combine_call(counts, query.shape, partial, dtype=jnp.float32)
    out, found = _pallas.call(
        functools.partial(_finish_kernel, work=work),
        name="combine_parts",
        grid=(*grid[:2], grid[2] + 1),
        in_specs=[*in_specs, whole(sums)],
        out_specs=[out_spec, pl.BlockSpec((None, None, KINDS), lambda row, g, part: (row, g, 0))],
        out_shape=[out_shape, jax.ShapeDtypeStruct((counts.size, query.shape[2], KINDS), jnp.float32)],
    )(by_row(counts), *partial, sums)
    return by_query(out, query.shape), found.reshape(*query.shape[:3], KINDS)
