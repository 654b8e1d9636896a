"""The tokens that a decode step attends: scores of all that have codes, then Top-p; on Hopper GPUs both in one."""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_top_p
from pallas_kernels.prepare_query import padded_heads
from rabitq_jax import codes as key_codes
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.cache import LayerCache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.exact_logsumexp import exact_logsumexp
from rabitq_jax.prepared_query import prepare_query
from rabitq_jax.scores import proxy_scores
from rabitq_jax.top_p import Selection, select_top_p


def choose_tokens(
    query: jax.Array,
    cache: LayerCache,
    config: RaBitQConfig,
    softmax_scale: float,
    prng_key: jax.Array | None,
    layer: int = 0,
) -> Selection:
    """Estimate the logits of all tokens that have codes, and choose by plain Top-p.

    Args:
      query: [B,K,G,D].
      cache: with codes; it already holds the new token.
      config: `scores` and `select` name the implementation. "mosaic" makes scores and selection in one go, with bins
        of 1/8 nat. None for both is "mosaic" on a Hopper GPU where it takes the shape.
      softmax_scale: factor from <q, k> to a logit.
      prng_key, layer: for config.query_rounding "random"; see `quantize_query`.

    Returns:
      A Selection; with kernels, a superset of the definition's.

    Raises:
      ValueError: a PRNG key is missing.
      NotImplementedError: the kernel that was named cannot take the shape.
    """
    assert cache.codes is not None
    if uses_mosaic(cache, config):
        return _choose_mosaic(query, cache, config, softmax_scale, prng_key, layer)
    quantized, exact_lse = quantize_and_sum(query, cache, config, softmax_scale, prng_key, layer)
    with jax.named_scope("proxy_scores"):
        scores = proxy_scores(
            query, quantized, cache.codes, cache.quantized, softmax_scale=softmax_scale, implementation=config.scores
        )
    with jax.named_scope("select_top_p"):
        return select_top_p(
            scores, exact_lse, cache.quantized, cache.length,
            sink=config.sink, top_p=config.top_p, implementation=config.select,
        )  # fmt: skip


def uses_mosaic(cache: LayerCache, config: RaBitQConfig) -> bool:
    """Whether scores are made in bins, by the kernels for Hopper GPUs.

    Raises:
      NotImplementedError: such kernels were named, but are not for this device.
    """
    assert cache.codes is not None
    for name in ("select", "attend"):
        if getattr(config, name) == "mosaic" and not on_hopper():
            raise NotImplementedError(f"{name} 'mosaic' needs a Hopper GPU and JAX 0.11 or newer")
    if config.select == "mosaic":
        return True
    unnamed = config.scores is None and config.select is None
    return unnamed and on_hopper() and mosaic_top_p.takes(cache.codes.bits, cache.codes.key_centroids)


def quantize_and_sum(
    query: jax.Array,
    cache: LayerCache,
    config: RaBitQConfig,
    softmax_scale: float,
    prng_key: jax.Array | None,
    layer: int = 0,
) -> tuple[key_codes.Int4Query, jax.Array]:
    """The queries in INT4, and the log-sum-exp of the exact tokens, float32 [B,K,G]: -inf for p over the scored tokens.

    Arguments are those of `choose_tokens`.
    """
    assert cache.codes is not None
    quantized = key_codes.quantize_query(
        query,
        cache.codes.rotation,
        cache.codes.query_centroid,
        rounding=config.query_rounding,
        key=prng_key,
        layer=layer,
    )
    exact_lse = jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
    if config.top_p_scope == "all":
        exact_lse = exact_logsumexp(
            query, cache.keys, cache.quantized, cache.length,
            sink=config.sink, window=config.window, softmax_scale=softmax_scale,
            implementation="pallas" if config.attend == "mosaic" else config.attend,
        )  # fmt: skip
    return quantized, exact_lse


def _choose_mosaic(query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer) -> Selection:
    codes = cache.codes
    assert codes is not None
    batch, kv_heads, group = query.shape[:3]
    zeros = mosaic_top_p.zeros(batch, kv_heads, padded_heads(group), cache.capacity)
    prepared = prepare_query(
        query, cache, config, softmax_scale=softmax_scale, prng_key=prng_key, layer=layer, zeros=zeros
    )
    indices, counts, scored, mass = mosaic_top_p.score_and_select(
        prepared.planes, prepared.factors, prepared.base, prepared.shift, prepared.exact_lse, prepared.zeros,
        codes.bits, codes.scale, codes.bias, softmax_scale, cache.quantized, cache.length,
        group=group, sink=config.sink, top_p=config.top_p,
    )  # fmt: skip
    return Selection(indices=indices, counts=counts, scored=scored, mass=mass)
