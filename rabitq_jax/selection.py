"""The tokens that a decode step attends, from queries and key codes: scores, then Top-p; on Hopper GPUs both in one."""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_top_p
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.codes import Int4Query, KeyCodes
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.scores import centroid_shift, proxy_scores
from rabitq_jax.top_p import Selection, select_top_p


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
    indices, counts, scored, mass = mosaic_top_p.score_and_select(
        quantized_query.levels, codes.bits, gain, codes.scale, codes.bias, softmax_scale, shift,
        _likely_peak(quantized_query, gain, codes, shift, quantized), exact_lse, quantized, length,
        sink=config.sink, top_p=config.top_p,
    )  # fmt: skip
    return Selection(indices=indices, counts=counts, scored=scored, mass=mass)


SAMPLES = 256
DEVIATIONS = 4.3
HEADROOM = 4.0


def _likely_peak(quantized_query: Int4Query, gain, codes: KeyCodes, shift, quantized) -> jax.Array:
    """A number that the largest score is not likely to pass, float32 [B,K,G]: the top of the bins.

    It need not be right: scores above it are kept, and counted for less than they are, so that a few tokens more are
    selected. The estimate takes bits for random, so that a score has the deviation gain |u| scale about its centroid's.
    """
    tokens = codes.bits.shape[2]
    position = jnp.arange(0, tokens, max(1, tokens // SAMPLES))
    scale = codes.scale[:, :, position].astype(jnp.float32)
    valid = (position < quantized[:, None])[:, None] & jnp.isfinite(scale)
    mean = jnp.sum(jnp.where(valid, scale, 0), axis=-1) / jnp.maximum(jnp.sum(valid, axis=-1), 1)
    norm = jnp.linalg.norm(quantized_query.levels.astype(jnp.float32), axis=-1)
    has_code = jnp.arange(shift.shape[-1]) * codes.tokens_per_centroid < quantized[:, None]
    centre = jnp.max(jnp.where(has_code[:, None, None] & jnp.isfinite(shift), shift, -jnp.inf), axis=-1)
    centre = jnp.where(centre == -jnp.inf, 0.0, centre)
    return centre + DEVIATIONS * gain * norm * mean[..., None] + HEADROOM
