"""A decode step's attention with selection "debiased" or "certified": select, attend exactly, verify, and extend.

debiased    Top-p on weights that are free of the noise's bias; what was captured is then verified.
certified   Top-p with margins from the error model; heads whose verified share may fall short of p, at the failure
            rate, get lower thresholds once, and their kv heads attend anew. What is still short is reported.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_attention
from rabitq_jax.cache import LayerCache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.noisy_bins import NoisyBins
from rabitq_jax.noisy_scores import NoisyScores
from rabitq_jax.selection import uses_mosaic
from rabitq_jax.top_p import Selection


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


def attend_certified(
    query: jax.Array, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer: int = 0
) -> tuple[jax.Array, Selection, Verification]:
    """Attention of one token, with its captured mass verified.

    Args:
      query: [B,K,G,D].
      cache: with codes; it holds the new token.
      config: selection "debiased" or "certified".
      Others: as of `selection.choose_tokens`.

    Returns:
      [B,K,G,D], in float32 or the query's dtype; the tokens attended in the end; and what was verified.
      `Selection.mass` is the share that the estimates claim, before anything was attended.

    Raises:
      NotImplementedError: the implementation that was named cannot do it.
    """
    estimates = (NoisyBins if _uses_bins(query, cache, config) else NoisyScores)(
        query, cache, config, softmax_scale, prng_key, layer
    )
    with jax.named_scope("find_thresholds"):
        limits = estimates.limits()
    with jax.named_scope("keep_by_thresholds"):
        indices, counts = estimates.keep(limits)
    with jax.named_scope("verified_attention"):
        last = estimates.attend((indices, counts), limits)
    short, read = jnp.zeros(query.shape[:3], bool), counts
    if config.selection == "certified" and config.top_p < 1:
        with jax.named_scope("extend"):
            last, short, indices = estimates.extend(limits, last, indices)
        read = counts + jnp.where(jnp.any(short, axis=-1), last.counts, 0)
    verified, bound = last.certificate.verified, last.certificate.bound
    out = _add_tail(last.out, verified, cache, config) if config.tail == "mean" else last.out
    selection = Selection(
        indices=indices,
        counts=last.counts,
        scored=last.number.astype(jnp.int32),
        mass=estimates.claimed(limits),
    )
    return out, selection, Verification(verified=verified, bound=bound, extended=short, read=read)


def _uses_bins(query, cache: LayerCache, config: RaBitQConfig) -> bool:
    """Whether scores are made in bins; where nobody asked for them by name, only if attention to what they list has a
    kernel.

    Raises:
      NotImplementedError: only one of both was asked for by name.
    """
    takes = mosaic_attention.takes(query.shape[2], query.shape[3], cache.keys.dtype.name)
    uses_bins = uses_mosaic(cache, config) and (takes or config.select == "mosaic")
    if config.attend is not None and uses_bins != (config.attend == "mosaic"):
        raise NotImplementedError(
            f"selection {config.selection!r} needs select and attend both 'mosaic' or neither, got select "
            f"{config.select!r} and attend {config.attend!r}"
        )
    return uses_bins


def _add_tail(out, verified, cache: LayerCache, config: RaBitQConfig):
    """The mass that was left out, at the mean value of the scored tokens: out is a mean over the attended ones."""
    assert cache.scored_values is not None
    count = jnp.maximum(cache.quantized - config.sink, 1)[:, None, None]
    mean = cache.scored_values / count
    share = verified[..., None]
    return share * out + (1 - share) * mean[:, :, None]
