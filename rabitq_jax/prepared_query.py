"""What a decode step's queries are turned into before they meet the codes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_prepare_query
from pallas_kernels import prepare_query as kernel
from pallas_kernels.popcount_scores import bit_planes
from rabitq_jax import codes as key_codes
from rabitq_jax._dispatch import on_hopper, select
from rabitq_jax.cache import LayerCache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.error_model import noise_gain, noise_gains
from rabitq_jax.exact_logsumexp import exact_logsumexp_reference
from rabitq_jax.scores import centroid_shift


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedQuery:
    """Queries in INT4, cut into bits, and the numbers that their scores need. H is G, padded to a multiple of 4.

    Attributes:
      planes: int32 [B,K,H,4,W], bit planes of the levels; see `pallas_kernels.popcount_scores`.
      factors: float32 [B,K,H,2], step times softmax scale, and minus the sum of the levels.
      noise: float32 [B,K,H], `error_model.noise_gain`.
      base: float32 [B,K,H], where bins of scores begin: above the largest score, as a rule (see
        `pallas_kernels.prepare_query.likely_peak`).
      shift: float32 [B,K,H,C], scaled <q, c_k>.
      exact_lse: float32 [B,K,H], log-sum-exp of the exact tokens' logits; -inf for p over the scored tokens.
      zeros: int32 [B,K,Z], for kernels to count in.
    """

    planes: jax.Array
    factors: jax.Array
    noise: jax.Array
    base: jax.Array
    shift: jax.Array
    exact_lse: jax.Array
    zeros: jax.Array


def prepare_query_reference(
    query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer: int, zeros: int
):
    """`prepare_query` in plain jnp: its definition."""
    codes = cache.codes
    assert codes is not None
    group = query.shape[2]
    quantized = key_codes.quantize_query(
        query, codes.rotation, codes.query_centroid, rounding=config.query_rounding, key=prng_key, layer=layer
    )
    shift = centroid_shift(query, codes, softmax_scale)
    gain = quantized.step * softmax_scale
    noise = noise_gain(query, quantized.step, codes, softmax_scale=softmax_scale, rounding=config.query_rounding)
    minus_sum = -jnp.sum(quantized.levels, axis=-1).astype(jnp.float32)

    token = kernel.sample_positions(cache.quantized[:, None], config.sink, cache.capacity)
    sample = jnp.take_along_axis(cache.keys, token[:, None, :, None], axis=2)
    dtype = jnp.bfloat16 if query.dtype == cache.keys.dtype == jnp.bfloat16 else jnp.float32
    logits = softmax_scale * jnp.einsum(
        "bkgd,bksd->bkgs", query.astype(dtype), sample.astype(dtype),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    base = kernel.likely_peak(logits, cache.quantized[:, None, None], config.sink)

    exact_lse = jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
    if config.top_p_scope == "all":
        exact_lse = exact_logsumexp_reference(
            query, cache.keys, cache.quantized, cache.length,
            sink=config.sink, window=config.window, softmax_scale=softmax_scale,
        )  # fmt: skip

    def padded(x):
        return jnp.pad(x, [(0, 0)] * 2 + [(0, kernel.padded_heads(group) - group)] + [(0, 0)] * (x.ndim - 3))

    return PreparedQuery(
        planes=padded(bit_planes(quantized.levels)),
        factors=padded(jnp.stack([gain, minus_sum], axis=-1)),
        noise=padded(noise),
        base=padded(base),
        shift=padded(shift),
        exact_lse=padded(exact_lse),
        zeros=jnp.zeros((*query.shape[:2], zeros), jnp.int32),
    )


def _prepare_with_kernel(
    prepare, query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer: int, zeros: int
):
    codes = cache.codes
    assert codes is not None
    planes, factors, noise, base, shift, exact_lse, zero = prepare(
        query, cache.keys, codes.rotation, codes.query_centroid, codes.key_centroids,
        key_codes.rounding_seed(config.query_rounding, prng_key), layer, cache.quantized, cache.length,
        sink=config.sink, softmax_scale=softmax_scale, scope_all=config.top_p_scope == "all", zeros=zeros,
        noise_gains=noise_gains(codes.rotation.shape[0], softmax_scale, config.query_rounding),
    )  # fmt: skip
    return PreparedQuery(
        planes=planes, factors=factors, noise=noise, base=base, shift=shift, exact_lse=exact_lse, zeros=zero
    )


IMPLEMENTATIONS = {
    "xla": prepare_query_reference,
    "pallas": functools.partial(_prepare_with_kernel, kernel.prepare_query),
    "mosaic": functools.partial(_prepare_with_kernel, mosaic_prepare_query.prepare_query),
}


def prepare_query(
    query, cache: LayerCache, config: RaBitQConfig, *, softmax_scale: float, prng_key, zeros: int, layer: int = 0,
    implementation=None,
) -> PreparedQuery:  # fmt: skip
    """Rotate and quantize queries, and make all else of them that scores in bins need.

    Args:
      query: [B,K,G,D].
      cache: with codes; it holds the new token.
      softmax_scale: factor from <q, k> to a logit.
      prng_key, layer: for config.query_rounding "random"; see `quantize_query`.
      zeros: words a kv head, a multiple of 256.
      implementation: "xla", "pallas", "mosaic" or None, which is "mosaic" on a Hopper GPU if it takes the shape.

    Returns:
      A PreparedQuery. Heads that are padding have levels, gain and shift of zero.

    Raises:
      ValueError: rounding is "random" and there is no key.
      NotImplementedError: the kernel that was named cannot take the shape.
    """
    assert cache.codes is not None
    if implementation is None and on_hopper():
        takes = mosaic_prepare_query.takes(query, cache.keys, cache.codes.rotation)
        implementation = "mosaic" if takes else "pallas"
    prepare = select(IMPLEMENTATIONS, implementation, gpu="pallas")
    return prepare(query, cache, config, softmax_scale, prng_key, layer, zeros)
