"""Sums over the tokens of a list that query heads found themselves, from their exact and their estimated logits.

    found_tokens   program (kv head, split): an equal run of the list's tiles -> its sums

Splits are summed by XLA. The equations are those of rabitq_jax/certificate.py; the normal distribution's logarithm is
Numerical Recipes' Chebyshev fit of erfc (relative error below 1.2e-7), since Triton has no erfc.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas
from pallas_kernels.debiased_mass import deviation

TILE = 128
PROGRAMS = 512
SUMS = 6
ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277,
)  # fmt: skip


def log_normal_cdf(x):
    """log Phi(x), float32."""
    z = jnp.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.5 * z)
    fit = jnp.full_like(t, ERFC[-1])
    for coefficient in ERFC[-2::-1]:
        fit = fit * t + coefficient
    log_tail = jnp.log(0.5 * t) - z * z + fit
    return jnp.where(x < 0, log_tail, jnp.log1p(-jnp.exp(log_tail)))


def _kernel(
    count_ref, quantized_ref, noise_ref, bulk_ref, single_ref, peak_ref, scale_ref, scores_ref, indices_ref, logits_ref,
    sums_ref, *, splits, tile, sink, deviations, least_deviation, far, largest_log,
):  # fmt: skip
    """count, quantized []; noise, bulk, single and peak [G]; scale [T], scores [G,T], indices [S], logits [G,S] ->
    sums [SUMS, M]: attended, own, missed, variance, information, score."""
    group = scores_ref.shape[0]
    rows = _pallas.power_of_two(group)
    count, quantized = count_ref[...], quantized_ref[...]
    tiles = pl.cdiv(count, tile)
    split = pl.program_id(1)
    first, stop = split * tiles // splits, (split + 1) * tiles // splits
    each = jnp.arange(rows, dtype=jnp.int32)
    noise, bulk, single, peak = (
        _pallas.load_masked(ref, (each,), each < group)[:, None] for ref in (noise_ref, bulk_ref, single_ref, peak_ref)
    )
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, tile), axis) for axis in (0, 1))

    def add_tile(i, sums):
        slot = i * tile + jnp.arange(tile, dtype=jnp.int32)
        in_list = slot < count
        token = _pallas.load_masked(indices_ref, (slot,), in_list)
        scale = _pallas.load_masked(scale_ref, (token,), in_list)
        valid = in_list[None, :] & (row < group)
        true = _pallas.load_masked(logits_ref, (row, i * tile + column), valid)
        noisy = _pallas.load_masked(scores_ref, (row, token[None, :] + 0 * row), valid)

        sd = deviation(noise, scale[None, :], least_deviation)
        threshold = jnp.minimum(bulk, single - deviations * sd)
        scored = valid & ((token >= sink) & (token < quantized))[None, :]
        found = scored & ~((noisy < threshold) & (noisy > -jnp.inf))
        x = true - peak
        weight = jnp.exp(jnp.minimum(x, largest_log))

        tau = jnp.clip((threshold - true) / sd, -2 * far, 2 * far)
        log_found = log_normal_cdf(-tau)
        log_h0, log_h1, log_h2 = (log_normal_cdf(tau - j * sd) - log_found for j in range(3))
        missed = jnp.exp(x + log_h0) - jnp.exp(x + log_h1)
        spread = jnp.exp(2 * x + log_h0) - 2 * jnp.exp(2 * x + log_h1) + jnp.exp(2 * x + sd * sd + log_h2)
        near = found & (tau > -far)
        hazard = jnp.exp(-0.5 * tau * tau - log_found) * (1 / math.sqrt(2 * math.pi))
        sure = near & (tau < 0.5)
        terms = (
            jnp.where(valid, weight, 0.0),
            jnp.where(found | (valid & ~scored), weight, 0.0),
            jnp.where(near, missed, 0.0),
            jnp.where(near, missed * missed + jnp.maximum(spread, 0.0), 0.0),
            jnp.where(sure, 1 + tau * hazard - hazard * hazard, 0.0),
            jnp.where(sure, (noisy - true) / sd - hazard, 0.0),
        )
        return tuple(old + term for old, term in zip(sums, terms, strict=True))

    zero = jnp.zeros((rows, tile), jnp.float32)
    sums = jax.lax.fori_loop(first, stop, add_tile, (zero,) * SUMS)
    for i, total in enumerate(sums):
        sums_ref[i, :] = jnp.sum(total, axis=1)


def found_tokens(
    scores, noise, scale, quantized, bulk, single, peak, indices, counts, logits,
    *, sink, deviations, least_deviation, far, largest_log,
):  # fmt: skip
    """The sums of `rabitq_jax.certificate.Found` and the masses beside them, in units of e^peak.

    Args:
      scores: float32 [B,K,G,T].
      noise, bulk, single, peak: float32 [B,K,G].
      scale: bfloat16 [B,K,T].
      quantized: int32 [B].
      indices, counts: int32 [B,K,S] and [B,K].
      logits: float32 [B,K,G,S], exact logits of the listed tokens.

    Returns:
      Six float32 [B,K,G]: attended, own, missed, variance, information, score.
    """
    batch, kv_heads, group, _ = scores.shape
    heads, rows = batch * kv_heads, _pallas.power_of_two(group)
    tile = _pallas.block_of(indices.shape[-1], TILE)
    splits = min(_pallas.power_of_two(pl.cdiv(PROGRAMS, heads)), _pallas.power_of_two(indices.shape[-1] // tile))
    inputs = (noise, bulk, single, peak, scale, scores, indices, logits)
    sums = _pallas.call(
        functools.partial(
            _kernel, splits=splits, tile=tile, sink=sink, deviations=deviations, least_deviation=least_deviation,
            far=far, largest_log=largest_log,
        ),
        name="found_tokens",
        grid=(heads, splits),
        in_specs=[
            _pallas.per_head(counts, kv_heads),
            _pallas.per_sequence(kv_heads),
            *(_pallas.per_head(x, kv_heads) for x in inputs),
        ],
        out_specs=pl.BlockSpec((None, None, SUMS, rows), lambda row, i: (row, i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((heads, splits, SUMS, rows), jnp.float32),
    )(counts, quantized, *inputs)  # fmt: skip
    sums = jnp.sum(sums, axis=1)[..., :group].reshape(batch, kv_heads, SUMS, group)
    return tuple(sums[:, :, i] for i in range(SUMS))
