"""A decode step's attention with selection "debiased" or "certified": select, attend exactly, verify, and extend.

debiased    Top-p on weights that are free of the noise's bias; what was captured is then verified.
certified   Top-p with margins from the error model; heads whose verified share may fall short of p, at the failure
            rate, get lower thresholds once, and their kv heads attend anew. What is still short is reported.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rabitq_jax.cache import LayerCache
from rabitq_jax.certificate import Certificate, certify
from rabitq_jax.codes import Int4Query
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.error_model import noise_gain
from rabitq_jax.scores import proxy_scores
from rabitq_jax.threshold_selection import Kept, keep_by_thresholds
from rabitq_jax.thresholds import (
    HeadMass,
    NoisyLogits,
    Thresholds,
    certified_thresholds,
    debiased_thresholds,
    extended_thresholds,
    measure_masses,
)
from rabitq_jax.top_p import Selection
from rabitq_jax.verified_attention import verified_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What a step knows of the attention that it captured.

    Attributes:
      verified, bound: float32 [B,K,G], as in `Certificate`.
      extended: bool [B,K,G], query heads that had a second round.
      read: int32 [B,K], tokens that kv heads attended, those of a second round once more.
    """

    verified: jax.Array
    bound: jax.Array
    extended: jax.Array
    read: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Round:
    """The result of attending to what thresholds keep."""

    out: jax.Array
    kept: Kept
    certificate: Certificate


def attend_certified(
    query: jax.Array,
    quantized_query: Int4Query,
    exact_lse: jax.Array,
    cache: LayerCache,
    config: RaBitQConfig,
    softmax_scale: float,
) -> tuple[jax.Array, Selection, Verification]:
    """Attention of one token, with its captured mass verified.

    Args:
      query: [B,K,G,D], exact, and the same in INT4.
      exact_lse: float32 [B,K,G], as in `select_top_p`.
      cache: with codes; it holds the new token.
      config: selection "debiased" or "certified".

    Returns:
      float32 [B,K,G,D]; the tokens attended in the end; and what was verified. `Selection.mass` is the share that the
      estimates claim, before anything was attended.

    Raises:
      NotImplementedError: the implementation that was named cannot do it.
    """
    noisy = _estimate(query, quantized_query, cache, config, softmax_scale)
    with jax.named_scope("find_thresholds"):
        mass = measure_masses(noisy, exact_lse)
        choose = debiased_thresholds if config.selection == "debiased" else certified_thresholds
        thresholds, below = choose(
            noisy, mass, top_p=config.top_p, failure_rate=config.failure_rate, implementation=config.select
        )

    def attend(thresholds: Thresholds, rows=None) -> _Round:
        return _attend_round(query, cache, noisy, mass, thresholds, rows, config, softmax_scale)

    def extend(first: _Round):
        known = first.certificate
        lower = extended_thresholds(
            noisy, mass, thresholds, below, known.rest, known.bulk, known.attended, known.own, short,
            top_p=config.top_p, implementation=config.select,
        )  # fmt: skip
        rows = jnp.any(short, axis=-1)
        second = attend(lower, rows)
        pick = lambda new, old: jnp.where(rows.reshape(*rows.shape, *(1,) * (new.ndim - 2)), new, old)  # noqa: E731
        return jax.tree.map(pick, second, first), first.kept.counts + second.kept.counts

    last = attend(thresholds)
    short, read = jnp.zeros(query.shape[:3], bool), last.kept.counts
    if config.selection == "certified" and config.top_p < 1:
        short = last.certificate.bound < config.top_p
        with jax.named_scope("extend"):
            last, read = jax.lax.cond(jnp.any(short), extend, lambda first: (first, first.kept.counts), last)
    verified, bound = last.certificate.verified, last.certificate.bound
    out = _add_tail(last.out, verified, cache, config) if config.tail == "mean" else last.out
    selection = Selection(
        indices=last.kept.indices,
        counts=last.kept.counts,
        scored=last.kept.scored,
        mass=1 - below / jnp.where(mass.total == 0, 1.0, mass.total),
    )
    return out, selection, Verification(verified=verified, bound=bound, extended=short, read=read)


def _estimate(query, quantized_query: Int4Query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float):
    """NoisyLogits of the cache's tokens."""
    if config.select == "mosaic":
        raise NotImplementedError(f"select 'mosaic' keeps no scores, which selection {config.selection!r} needs")
    assert cache.codes is not None
    with jax.named_scope("proxy_scores"):
        scores = proxy_scores(
            query, quantized_query, cache.codes, cache.quantized,
            softmax_scale=softmax_scale, implementation=config.scores,
        )  # fmt: skip
    noise = noise_gain(query, quantized_query, cache.codes, softmax_scale=softmax_scale, rounding=config.query_rounding)
    return NoisyLogits(scores=scores, noise=noise, scale=cache.codes.scale, quantized=cache.quantized, sink=config.sink)


def _attend_round(
    query, cache: LayerCache, noisy: NoisyLogits, mass: HeadMass, thresholds: Thresholds, rows, config, softmax_scale
) -> _Round:
    """Select, attend and verify; in the kv heads bool [B,K] alone, where `rows` is not None."""
    with jax.named_scope("keep_by_thresholds"):
        kept = keep_by_thresholds(noisy, mass, thresholds, cache.length, implementation=config.select)
        if rows is not None:
            kept = dataclasses.replace(kept, counts=jnp.where(rows, kept.counts, 0))
    with jax.named_scope("verified_attention"):
        out, log_attended, log_own, found = verified_attention(
            query, cache.keys, cache.values, kept.indices, kept.counts, noisy, mass, thresholds,
            softmax_scale=softmax_scale, implementation=config.attend,
        )  # fmt: skip
    scored = jnp.maximum(noisy.quantized - noisy.sink, 0)[:, None, None]
    certificate = certify(found, kept.left_out, log_attended, log_own, kept.scored >= scored, mass, thresholds)
    return _Round(out=out, kept=kept, certificate=certificate)


def _add_tail(out, verified, cache: LayerCache, config: RaBitQConfig):
    """The mass that was left out, at the mean value of the scored tokens: out is a mean over the attended ones."""
    assert cache.scored_values is not None
    count = jnp.maximum(cache.quantized - config.sink, 1)[:, None, None]
    mean = cache.scored_values / count
    share = verified[..., None]
    return share * out + (1 - share) * mean[:, :, None]
