"""What debiased and certified selection ask of estimates, answered from bins of scores; for Hopper GPUs.

The same questions as in noisy_scores.py. Thresholds lie on the edges of bins: those of z + sd^2 / 2, which tokens are
kept by, and of debiased logits z - sd^2 / 2, whose masses are counted. See pallas_kernels/mosaic_bins.py.

What follows from the sums over found tokens is reckoned by programs of a query head each, with the functions of
certificate.py and thresholds.py: outside of kernels, every few of these operations are a launch.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_certified
from pallas_kernels.gathered_attention import by_row
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT
from pallas_kernels.mosaic_certified_threshold import LIMITS, Rule
from pallas_kernels.prepare_query import padded_heads, sample_positions
from pallas_kernels.verified_attention import verified_attention_of_bins
from rabitq_jax.cache import LayerCache
from rabitq_jax.certificate import Certificate, Round, certify, summarize
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.prepared_query import prepare_query
from rabitq_jax.thresholds import (
    LEAST_DEVIATION,
    LEAST_SINGLE,
    SHARED,
    HeadMass,
    Thresholds,
    confidence,
    extended_thresholds,
    left_out,
    upper_bound,
)
from rabitq_jax.verified_attention import CONSTANTS, masses


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What the kernels say of a query head (`mosaic_certified_threshold.LIMITS`): float32 of one shape."""

    noise: jax.Array
    peak: jax.Array
    base: jax.Array
    kept: jax.Array
    depth: jax.Array
    below: jax.Array
    total: jax.Array
    largest_scale: jax.Array

    def mass(self, scales) -> HeadMass:
        """With the typical deviation of tokens of these scales [..., N], a sample."""
        mean_square = jnp.sum(jnp.square(scales), axis=-1) / scales.shape[-1]
        deviation = jnp.maximum(self.noise * jnp.sqrt(mean_square), LEAST_DEVIATION)
        return HeadMass(peak=self.peak, total=self.total, mean_deviation=deviation)

    def edge(self, kept):
        """The threshold under which so many bins are kept."""
        return jnp.where(kept == BINS, -jnp.inf, self.base - kept / BINS_PER_NAT)

    def thresholds(self, deviations: float) -> Thresholds:
        single = self.base - self.depth / BINS_PER_NAT
        return Thresholds(bulk=self.edge(self.kept), single=single, deviations=deviations)

    def at(self, thresholds: Thresholds, below) -> "_Limits":
        """Those of other thresholds on the edges of bins."""
        all_kept = thresholds.bulk == -jnp.inf
        kept = jnp.floor((self.base - jnp.where(all_kept, 0.0, thresholds.bulk)) * BINS_PER_NAT + 0.5)
        depth = jnp.minimum((self.base - thresholds.single) * BINS_PER_NAT, 1e6)
        return dataclasses.replace(self, kept=jnp.where(all_kept, float(BINS), kept), depth=depth, below=below)


def find_bulk(limits: _Limits, places, counts, budget, level, deviations: float):
    """`thresholds.find_bulk` of a query head, of whole bins, the best of which is always kept.

    Args:
      places, counts: float32 [256], of `mosaic_certified.load_counts`.
    """
    # Each with the sum over the bins behind bin `number`.
    number = BINS - 1 - jnp.arange(BINS)
    at_edge = jnp.exp(limits.base - limits.peak - (number + 1) / BINS_PER_NAT)
    # At most, since exp is convex; the last bin also holds what lies below it.
    width = jnp.where(number == BINS - 2, 0.0, 1 - math.exp(-1 / BINS_PER_NAT))
    weights = at_edge * (counts - width * places)
    first, second = (jnp.cumsum(x) for x in (weights, weights * weights / jnp.maximum(counts, 1.0)))
    fits = upper_bound(first, second, level, deviations) <= budget
    # A bin that is not dropped, for each that does not fit what is behind it.
    last = jnp.minimum(jnp.sum(jnp.where(fits, 0.0, 1.0)), BINS - 1.0)
    return limits.edge(last + 1), jnp.sum(jnp.where(number == last, first, 0.0))


def read_limits(limits_ref) -> _Limits:
    return _Limits(*(limits_ref[i] for i in range(LIMITS)))


def conclude(sums, count, quantized_ref, scale_ref, limits_ref, *, sink: int, deviations: float):
    """`summarize` of a query head, in a kernel: from its sums, its list's length, quantized [], scale [T] and limits
    [LIMITS]."""
    limits, quantized = read_limits(limits_ref), quantized_ref[...]
    attended, own, found = masses(sums)
    scored = jnp.maximum(quantized - sink, 0).astype(jnp.float32)
    mass = limits.mass(sample_scales(scale_ref, quantized, sink))
    certificate = certify(found, limits.below, attended, own, scored, mass, limits.thresholds(deviations))
    return summarize(certificate, found, count)


def sample_scales(scale, quantized, sink: int):
    """float32 [N], scales [T] of tokens spread evenly over the scored ones."""
    return scale[sample_positions(quantized, sink, scale.shape[0])].astype(jnp.float32)


def lower_limits(head, summary_ref, limits_ref, state_ref, *, deviations: float, top_p: float):
    """A query head's `extended_thresholds`, in a kernel: LIMITS numbers, as they were where it is not short."""
    limits = read_limits(limits_ref)
    known = Certificate(*(summary_ref[i] for i in range(6)))
    find = functools.partial(find_bulk, limits, *mosaic_certified.load_counts(state_ref, head))
    # The typical deviation does not matter here.
    mass = limits.mass(jnp.ones((1,)))
    lower, below = extended_thresholds(
        find, mass, limits.thresholds(deviations), limits.below, known, known.bound < top_p, top_p=top_p
    )
    new = limits.at(lower, below)
    return tuple(getattr(new, field.name) for field in dataclasses.fields(new))


class NoisyBins:
    """Bins of the scores of a decode step's queries [B,K,G,D], and attention by thresholds on them.

    Arguments are those of `selection.choose_tokens`. Limits are float32 [B,K,H,LIMITS].
    """

    def __init__(self, query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer: int):
        codes = cache.codes
        assert codes is not None
        self._query, self._cache, self._config, self._softmax_scale = query, cache, config, softmax_scale
        batch, kv_heads, group = query.shape[:3]
        self._heads, self._scale = padded_heads(group), codes.scale
        self._deviations = confidence(config.failure_rate)
        prepared = prepare_query(
            query, cache, config, softmax_scale=softmax_scale, prng_key=prng_key, layer=layer,
            zeros=mosaic_certified.zeros(batch, kv_heads, self._heads, cache.capacity), implementation="pallas",
        )  # fmt: skip
        certified = config.selection == "certified"
        rule = Rule(
            left_out=left_out(config.top_p, certified=certified), deviations=self._deviations, certified=certified,
            shared=SHARED, least_single=LEAST_SINGLE,
        )  # fmt: skip
        self._bins, self._state, self._first = mosaic_certified.score_and_select(
            prepared.planes, prepared.factors, prepared.base, prepared.shift, prepared.exact_lse, prepared.noise,
            prepared.zeros,
            codes.bits, codes.scale, codes.bias, softmax_scale, cache.quantized, cache.length,
            group=group, sink=config.sink, rule=rule,
        )  # fmt: skip

    def limits(self) -> jax.Array:
        """Those that the rule of the configuration chooses."""
        return self._first[2]

    def claimed(self, limits) -> jax.Array:
        """Share of the attention that the estimates say is kept: float32 [B,K,G]."""
        # Columns are cut out where they are used: what a branch takes from outside of it is an array of its own.
        below, total = (limits[:, :, : self._query.shape[2], i] for i in (5, 6))
        return 1 - below / jnp.where(total == 0, 1.0, total)

    def keep(self, limits, first: Round | None = None) -> tuple[jax.Array, jax.Array]:
        """Indices and counts of the tokens that are kept; after a first round, in kv heads that were short."""
        if first is None:
            return self._first[:2]
        return mosaic_certified.select_again(
            self._bins, limits, first.summary, self._scale, self._cache.quantized, self._cache.length,
            sink=self._config.sink, deviations=self._deviations, top_p=self._config.top_p,
        )  # fmt: skip

    def attend(self, indices, counts, limits) -> Round:
        """`verified_attention` over a list, and what follows from it."""
        sink, kv_heads = self._config.sink, self._query.shape[1]
        known = (
            (self._cache.quantized, pl.BlockSpec((None,), lambda row, g, part: (row // kv_heads,))),
            (by_row(self._scale), pl.BlockSpec((None, self._scale.shape[2]), lambda row, g, part: (row, 0))),
            (by_row(limits), pl.BlockSpec((None, None, LIMITS), lambda row, g, part: (row, g, 0))),
        )
        out, summary = verified_attention_of_bins(
            self._query, self._cache.keys, self._cache.values, indices, counts, self._bins, self._scale,
            self._cache.quantized, limits, softmax_scale=self._softmax_scale,
            sink=sink, deviations=self._deviations, **CONSTANTS,
            conclude=functools.partial(conclude, sink=sink, deviations=self._deviations), known=known,
        )  # fmt: skip
        return Round(out=out, summary=summary)

    def lower(self, limits, first: Round) -> jax.Array:
        """Limits of the second round."""
        find = functools.partial(lower_limits, deviations=self._deviations, top_p=self._config.top_p)
        return mosaic_certified.find_again(find, first.summary, limits, self._state)
