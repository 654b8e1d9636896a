"""Gathered attention, and what its exact logits say of the tokens outside the lists.

    attend    as in gathered_attention.py; it hands out the logits of the listed tokens
    found     program: the same tiles of lists, as numbers [query heads, tokens] -> sums of the terms below
    combine   program (kv head, query head, columns): the parts of a head, and of its sums

Sums are not made where logits are: there a head is one row of 16, most of which are padding.

A token's estimate comes as a float32 score, or as the byte of `mosaic_score_bins`: its place in the bin is then taken
to be the middle, and a threshold is a bin's edge. The equations are those of rabitq_jax/certificate.py; the normal
distribution is Numerical Recipes' Chebyshev fit of erfc (relative error below 1.2e-7), since Triton has no erfc.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas
from pallas_kernels.debiased_mass import deviation
from pallas_kernels.gathered_attention import Work, attend, by_row, combine, for_each_list
from pallas_kernels.mosaic_score_bins import BINS, BINS_PER_NAT, LARGEST_DEVIATION

# Sums over the list's tokens that a query head found itself, but for the first two; see `verified_attention`.
KINDS = 8
# Below LARGEST_DEVIATION by more than rounding.
SURE_DEVIATION = LARGEST_DEVIATION * (1 - 1e-5)
ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277,
)  # fmt: skip


def normal_cdf(x):
    """Phi(x), float32, with a small relative error wherever it is a normal number."""
    z = jnp.abs(x) * math.sqrt(0.5)
    # A reciprocal, by the fast instruction.
    t = jnp.square(jax.lax.rsqrt(1 + 0.5 * z))
    fit = jnp.full_like(t, ERFC[-1])
    for coefficient in ERFC[-2::-1]:
        fit = fit * t + coefficient
    tail = 0.5 * t * jnp.exp(fit - z * z)
    return jnp.where(x < 0, tail, 1 - tail)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Constants:
    kv_heads: int
    sink: int
    deviations: float
    least_deviation: float
    far: float
    largest_log: float


def _kernel(
    counts_ref, indices_ref, logits_ref, quantized_ref, limits_ref, scale_ref, estimates_ref, sums_ref,
    *, work: Work, constants: _Constants,
):  # fmt: skip
    """counts [R], indices [R,S], logits [R,G,S], quantized [B], limits [R,H,J], scale [R,T], estimates [R,G,T] of
    scores or [R,G,T/4] of bins -> sums [N,KINDS,H] of the parts."""

    def sum_list(head, place, count, first, stop, _):
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

    for_each_list(counts_ref, work, sum_list)


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
        over_found = 1 / normal_cdf(-tau)
        h0, h1, h2 = (normal_cdf(tau - j * sd) * over_found for j in range(3))
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


def verified_attention(
    query, keys, values, indices, counts, estimates, scale, quantized, limits,
    *, softmax_scale, sink, deviations, least_deviation, far, largest_log,
):  # fmt: skip
    """`rabitq_jax.verified_attention.verified_attention_reference`.

    Args:
      query, keys, values, indices, counts: as in `gathered_attention`.
      estimates: scores float32 [B,K,G,T], or bins int32 [B,K,G,T/4] of `mosaic_score_bins`.
      scale: bfloat16 [B,K,T].
      quantized: int32 [B].
      limits: float32 [B,K,H,J], H from G on, of each query head: noise and peak; then for scores the thresholds bulk
        and single; for bins base, how many bins the bulk keeps, and the depth of the single threshold in bins.

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
        functools.partial(_kernel, work=work, constants=constants),
        name="found_tokens",
        grid=(work.programs,),
        out_shape=jax.ShapeDtypeStruct((work.parts, KINDS, rows), jnp.float32),
    )(by_row(counts), by_row(indices), logits, quantized, *(by_row(x) for x in (limits, scale, estimates)))
    return combine(work, counts, query.shape, partial, sums, dtype=jnp.float32)
