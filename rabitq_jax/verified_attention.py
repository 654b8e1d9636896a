"""Exact attention over a list of tokens that, in the same pass, verifies what the list leaves out.

The logits of the attended tokens are there anyway; beside the softmax they give the mass of the list and of each query
head's own tokens, and the sums of certificate.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import verified_attention as kernel
from rabitq_jax._dispatch import select
from rabitq_jax.certificate import FAR, LARGEST_LOG, Found, found_terms
from rabitq_jax.gathered_attention import Tiles, rescale
from rabitq_jax.thresholds import (
    LEAST_DEVIATION,
    HeadMass,
    NoisyLogits,
    Thresholds,
    deviation_of,
    threshold_of,
)


def verified_attention_reference(
    query, keys, values, indices, counts, noisy: NoisyLogits, mass: HeadMass, thresholds: Thresholds,
    *, softmax_scale: float,
):  # fmt: skip
    """`verified_attention` in tiles of the index list: its definition."""
    tiles = Tiles(query, keys, values, indices, counts, softmax_scale)
    bulk, single, peak = (x[..., None] for x in (thresholds.bulk, thresholds.single, mass.peak))

    def attend_tile(i, state):
        (peak_so_far, total, out), own, sums = state
        valid, token, logits, value = tiles.load(i)
        new_peak, weights, decay = rescale(peak_so_far, total, logits, valid)
        total = total * decay + jnp.sum(weights, axis=-1)
        out = out * decay[..., None] + jnp.einsum("bkgs,bksd->bkgd", weights, value, precision="highest")

        # A token that another head of the group has selected is attended, but was not found by this one.
        scores = jnp.take_along_axis(noisy.scores, token[:, :, None], axis=-1)
        sd = deviation_of(noisy.noise[..., None], jnp.take_along_axis(noisy.scale, token, axis=-1)[:, :, None])
        threshold = threshold_of(bulk, single, thresholds.deviations, sd)
        is_scored = valid & ((token >= noisy.sink) & (token < noisy.quantized[:, None, None]))[:, :, None]
        is_found = is_scored & ~((scores < threshold) & (scores > -jnp.inf))
        is_own = is_found | (valid & ~is_scored)
        own = own * decay + jnp.sum(jnp.where(is_own, weights, 0), axis=-1)
        terms = found_terms(logits, scores, sd, threshold, bulk, peak)
        add = lambda x, term: x + jnp.sum(jnp.where(is_found, term, 0), axis=-1)  # noqa: E731
        return (new_peak, total, out), own, jax.tree.map(add, sums, terms)

    zero = jnp.zeros(query.shape[:3], jnp.float32)
    nothing = Found(missed=zero, variance=zero, information=zero, score=zero, returned=zero, number=zero)
    (peak_found, total, out), own, found = jax.lax.fori_loop(
        0, tiles.count, attend_tile, (tiles.start(), zero, nothing)
    )
    out = jnp.where(counts[..., None, None] == 0, 0.0, out / total[..., None])
    relative = lambda x: jnp.exp(jnp.minimum(peak_found + jnp.log(x) - mass.peak, LARGEST_LOG))  # noqa: E731
    return out, relative(total), relative(own), found


def _verified_attention_pallas(
    query, keys, values, indices, counts, noisy: NoisyLogits, mass: HeadMass, thresholds: Thresholds,
    *, softmax_scale: float,
):  # fmt: skip
    limits = jnp.stack([noisy.noise, mass.peak, thresholds.bulk, thresholds.single], axis=-1)
    out, sums = kernel.verified_attention(
        query, keys, values, indices, counts, noisy.scores, noisy.scale, noisy.quantized, limits,
        softmax_scale=softmax_scale, sink=noisy.sink, deviations=thresholds.deviations, **CONSTANTS,
    )  # fmt: skip
    return out, *masses(tuple(sums[..., i] for i in range(kernel.KINDS)))


CONSTANTS: dict[str, Any] = {"least_deviation": LEAST_DEVIATION, "far": FAR, "largest_log": LARGEST_LOG}


def masses(sums):
    """From the kernel's sums: the mass attended, the head's own, and `Found`."""
    attended, own, *found = sums
    names = [field.name for field in dataclasses.fields(Found)]
    return attended, own, Found(**dict(zip(names, found, strict=True)))


IMPLEMENTATIONS = {"xla": verified_attention_reference, "pallas": _verified_attention_pallas}


def verified_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    counts: jax.Array,
    noisy: NoisyLogits,
    mass: HeadMass,
    thresholds: Thresholds,
    *,
    softmax_scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Found]:
    """`gathered_attention`, and what the attended logits say of the others.

    Args:
      query, keys, values, indices, counts, softmax_scale: as in `gathered_attention`.
      noisy, mass, thresholds: what chose the list.
      implementation: "xla", "pallas" or None.

    Returns:
      The output, float32 [B,K,G,D]; the mass attended, and the mass of each query head's own tokens, float32 [B,K,G],
      in units of e^peak; and the sums over these. Where the list is empty the output is zero, and the rest means
      nothing.
    """
    attend = select(IMPLEMENTATIONS, implementation, gpu="pallas")
    return attend(
        query, keys, values, indices, counts, noisy, mass, thresholds, softmax_scale=softmax_scale
    )  # fmt: skip
