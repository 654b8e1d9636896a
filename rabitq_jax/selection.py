"""The tokens that a decode step attends, from queries and key codes: scores, then Top-p; on Hopper GPUs both in one."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_top_p
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.codes import Int4Query, KeyCodes
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.scores import centroid_shift, proxy_scores, proxy_scores_reference
from rabitq_jax.top_p import Selection, select_top_p

SAMPLES = 128
HEADROOM = 2.0


def select_tokens(
    query: jax.Array,
    quantized_query: Int4Query,
    codes: KeyCodes,
    exact_lse: jax.Array,
    quantized: jax.Array,
    length: jax.Array,
    *,
    softmax_scale: float,
    config: RaBitQConfig,
) -> Selection:
    """Estimate the logits of all tokens that have codes, and choose by Top-p.

    Args:
      query: [B,K,G,D], exact, and the same in INT4.
      codes: of capacity T.
      exact_lse, quantized, length: as in `select_top_p`.
      config: `scores` and `select` name the implementation. "mosaic" makes scores and selection in one go, with bins
        of 1/8 nat. None for both is "mosaic" on a Hopper GPU where it takes the shape.

    Returns:
      A Selection; with kernels, a superset of the definition's.

    Raises:
      NotImplementedError: the kernel that was named cannot take the shape.
    """
    if config.select == "mosaic" and not on_hopper():
        raise NotImplementedError("select 'mosaic' needs a Hopper GPU and JAX 0.11 or newer")
    unnamed = config.scores is None and config.select is None
    if config.select == "mosaic" or (unnamed and on_hopper() and mosaic_top_p.takes(codes.bits, codes.key_centroids)):
        return _select_mosaic(query, quantized_query, codes, exact_lse, quantized, length, softmax_scale, config)
    with jax.named_scope("proxy_scores"):
        scores = proxy_scores(
            query, quantized_query, codes, quantized, softmax_scale=softmax_scale, implementation=config.scores
        )
    with jax.named_scope("select_top_p"):
        return select_top_p(
            scores, exact_lse, quantized, length, sink=config.sink, top_p=config.top_p, implementation=config.select
        )


def _select_mosaic(query, quantized_query, codes, exact_lse, quantized, length, softmax_scale, config) -> Selection:
    shift = centroid_shift(query, codes, softmax_scale)
    gain = quantized_query.step * softmax_scale
    base = likely_peak(quantized_query, gain, codes, softmax_scale, shift, config.sink, quantized)
    indices, counts, scored, mass = mosaic_top_p.score_and_select(
        quantized_query.levels, codes.bits, gain, codes.scale, codes.bias, softmax_scale, shift,
        base, exact_lse, quantized, length, sink=config.sink, top_p=config.top_p,
    )  # fmt: skip
    return Selection(indices=indices, counts=counts, scored=scored, mass=mass)


def likely_peak(quantized_query: Int4Query, gain, codes: KeyCodes, softmax_scale, shift, sink: int, quantized):
    """Where the largest score is likely to be, from a sample of the tokens: float32 [B,K,G], the top of the bins.

    It need not be right. Below the largest score, all tokens above it are kept; far above, bins are left unused.
    """
    scored = jnp.maximum(quantized - sink, 0)
    position = sink + (scored[:, None] * (2 * jnp.arange(SAMPLES) + 1)) // (2 * SAMPLES)
    at = lambda x: jnp.take_along_axis(x, position.reshape(-1, 1, SAMPLES, *(1,) * (x.ndim - 3)), axis=2)  # noqa: E731
    centroid = (position // codes.tokens_per_centroid)[:, None, None]
    scores = proxy_scores_reference(
        quantized_query.levels, at(codes.bits), gain, at(codes.scale), None if codes.bias is None else at(codes.bias),
        softmax_scale, jnp.take_along_axis(shift, centroid, axis=3),
    )  # fmt: skip
    scores = jnp.where(jnp.isfinite(scores), scores, 0)
    # The typical largest of n normal numbers, in deviations above their mean.
    log_n = jnp.log(jnp.maximum(scored, SAMPLES).astype(jnp.float32))
    root = jnp.sqrt(2 * log_n)
    deviations = root - (jnp.log(log_n) + math.log(4 * math.pi)) / (2 * root)
    normal = jnp.mean(scores, axis=-1) + deviations[:, None, None] * jnp.std(scores, axis=-1)
    return jnp.maximum(normal, jnp.max(scores, axis=-1)) + HEADROOM
