"""What debiased and certified selection ask of estimates, answered from bins of scores; for Hopper GPUs.

The same questions as in noisy_scores.py. Thresholds lie on the edges of bins; a token's score is known to its bin, the
sums of weights below a bin's edge are exact. See pallas_kernels/mosaic_score_bins.py.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_certified
from pallas_kernels import verified_attention as attention_kernel
from pallas_kernels.mosaic_certified_threshold import SPREAD, Rule
from pallas_kernels.mosaic_score_bins import BINS, BINS_PER_NAT
from pallas_kernels.prepare_query import padded_heads
from rabitq_jax.cache import LayerCache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.prepared_query import prepare_query
from rabitq_jax.thresholds import (
    LEAST_DEVIATION,
    LEAST_SINGLE,
    SHARED,
    HeadMass,
    Thresholds,
    confidence,
    upper_bound,
)
from rabitq_jax.verified_attention import CONSTANTS, log_masses


class NoisyBins:
    """Bins of the scores of a decode step's queries [B,K,G,D], and attention by thresholds on them.

    Arguments are those of `selection.choose_tokens`.

    Attributes:
      mass: HeadMass.
    """

    def __init__(self, query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer: int):
        codes = cache.codes
        assert codes is not None
        self._query, self._cache, self._config, self._softmax_scale = query, cache, config, softmax_scale
        batch, kv_heads, group = query.shape[:3]
        self._heads, self._scale = padded_heads(group), codes.scale
        prepared = prepare_query(
            query, cache, config, softmax_scale=softmax_scale, prng_key=prng_key, layer=layer,
            zeros=mosaic_certified.zeros(batch, kv_heads, self._heads, cache.capacity), implementation="pallas",
        )  # fmt: skip
        rule = Rule(
            top_p=config.top_p, deviations=confidence(config.failure_rate), certified=config.selection == "certified",
            shared=SHARED, least_single=LEAST_SINGLE,
        )  # fmt: skip
        self._bins, self._state, self._first = mosaic_certified.score_and_select(
            prepared.planes, prepared.factors, prepared.base, prepared.shift, prepared.exact_lse, prepared.noise,
            prepared.zeros,
            codes.bits, codes.scale, codes.bias, softmax_scale, cache.quantized, cache.length,
            group=group, sink=config.sink, rule=rule,
        )  # fmt: skip

    def _column(self, i: int):
        """A column of the real heads' limits. It is cut out where it is used: what a branch takes from outside of it is
        an array of its own."""
        return self._first[2][:, :, : self._query.shape[2], i]

    @property
    def _base(self):
        return self._column(2)

    @property
    def mass(self) -> HeadMass:
        # The mean of e^(sd^2 / 2), and of half a bin, says what the typical deviation is.
        typical = jnp.sqrt(jnp.maximum(2 * jnp.log(self._column(7)) + 1 / BINS_PER_NAT, LEAST_DEVIATION**2))
        return HeadMass(peak=self._column(1), total=self._column(6), mean_deviation=typical)

    def thresholds(self) -> tuple[Thresholds, jax.Array]:
        """Those that the rule of the configuration chooses, and C1 at them."""
        single = self._base - self._column(4) / BINS_PER_NAT
        if self._config.top_p == 1:
            single = jnp.full_like(single, -jnp.inf)
        deviations = confidence(self._config.failure_rate)
        return Thresholds(bulk=self._edge(self._column(3)), single=single, deviations=deviations), self._column(5)

    def _edge(self, kept):
        """The threshold under which so many bins are kept."""
        return jnp.where(kept == BINS, -jnp.inf, self._base - kept / BINS_PER_NAT)

    def find_bulk(self, budget, level, deviations: float) -> tuple[jax.Array, jax.Array]:
        """`thresholds.find_bulk`, of whole bins, the best of which is always kept."""
        at_edge = jnp.exp(self._base - self.mass.peak)[..., None] * jnp.exp(-jnp.arange(BINS) / BINS_PER_NAT)
        spreads = mosaic_certified.spreads(self._state, self._heads)[:, :, : self._query.shape[2]]
        masses = at_edge * spreads
        squares = masses * at_edge * (SPREAD * self._column(7)[..., None])
        # Below one bin kept, below two, ..., below all.
        first, second = (
            jnp.pad(jnp.cumsum(x[..., :0:-1], axis=-1)[..., ::-1], [(0, 0)] * 3 + [(0, 1)]) for x in (masses, squares)
        )
        fits = upper_bound(first, second, level[..., None], deviations) <= budget[..., None]
        dropped = jnp.minimum(jnp.sum(~fits, axis=-1), BINS - 1)
        below = jnp.take_along_axis(first, dropped[..., None], axis=-1)[..., 0]
        return self._edge(dropped + 1), below

    def keep(self, thresholds: Thresholds, rows=None) -> tuple[jax.Array, jax.Array]:
        """Indices and counts of the tokens that are kept; in kv heads bool [B,K] alone, if `rows` is not None."""
        if rows is None:
            return self._first[:2]
        return mosaic_certified.select_again(
            self._bins, self._limits(thresholds), rows, self._scale, self._cache.quantized, self._cache.length,
            sink=self._config.sink, deviations=thresholds.deviations,
        )  # fmt: skip

    def _limits(self, thresholds: Thresholds):
        """The kernels' form of thresholds: float32 [B,K,H,LIMITS]."""
        finite = jnp.where(thresholds.bulk == -jnp.inf, 0.0, thresholds.bulk)
        kept = jnp.where(thresholds.bulk == -jnp.inf, BINS, jnp.round((self._base - finite) * BINS_PER_NAT))
        depth = jnp.minimum((self._base - thresholds.single) * BINS_PER_NAT, 1e6)
        limits = jnp.stack([self._column(0), self.mass.peak, self._base, kept, depth, *[0 * kept] * 3], axis=-1)
        return jnp.pad(limits, [(0, 0)] * 2 + [(0, self._heads - limits.shape[2]), (0, 0)])

    def attend(self, indices, counts, thresholds: Thresholds):
        """`verified_attention` over a list."""
        limits = self._first[2] if indices is self._first[0] else self._limits(thresholds)
        out, sums = attention_kernel.verified_attention(
            self._query, self._cache.keys, self._cache.values, indices, counts, self._bins, self._scale,
            self._cache.quantized, limits, softmax_scale=self._softmax_scale,
            sink=self._config.sink, deviations=thresholds.deviations, **CONSTANTS,
        )  # fmt: skip
        return out, *log_masses(sums, self.mass)
