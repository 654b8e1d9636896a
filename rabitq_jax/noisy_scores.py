"""What debiased and certified selection ask of estimates, answered from float32 scores."""

import jax
import jax.numpy as jnp

from rabitq_jax.cache import LayerCache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.error_model import noise_gain
from rabitq_jax.scores import proxy_scores
from rabitq_jax.selection import quantize_and_sum
from rabitq_jax.threshold_selection import keep_by_thresholds
from rabitq_jax.thresholds import (
    NoisyLogits,
    Thresholds,
    certified_thresholds,
    debiased_thresholds,
    find_bulk,
    measure_masses,
)
from rabitq_jax.verified_attention import verified_attention


class NoisyScores:
    """Scores of a decode step's queries [B,K,G,D] and the size of their errors, and attention by thresholds on them.

    Arguments are those of `selection.choose_tokens`.

    Attributes:
      mass: HeadMass.
    """

    def __init__(self, query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer: int):
        assert cache.codes is not None
        self._query, self._cache, self._config, self._softmax_scale = query, cache, config, softmax_scale
        quantized, exact_lse = quantize_and_sum(query, cache, config, softmax_scale, prng_key, layer)
        with jax.named_scope("proxy_scores"):
            scores = proxy_scores(
                query, quantized, cache.codes, cache.quantized,
                softmax_scale=softmax_scale, implementation=config.scores,
            )  # fmt: skip
        noise = noise_gain(
            query, quantized.step, cache.codes, softmax_scale=softmax_scale, rounding=config.query_rounding
        )
        self._noisy = NoisyLogits(
            scores=scores, noise=noise, scale=cache.codes.scale, quantized=cache.quantized, sink=config.sink
        )
        self.mass = measure_masses(self._noisy, exact_lse)

    def thresholds(self) -> tuple[Thresholds, jax.Array]:
        """Those that the rule of the configuration chooses, and C1 at them."""
        config = self._config
        choose = debiased_thresholds if config.selection == "debiased" else certified_thresholds
        return choose(
            self._noisy, self.mass,
            top_p=config.top_p, failure_rate=config.failure_rate, implementation=config.select,
        )  # fmt: skip

    def find_bulk(self, budget, level, deviations: float) -> tuple[jax.Array, jax.Array]:
        """`thresholds.find_bulk`."""
        return find_bulk(self._noisy, self.mass, budget, level, deviations, implementation=self._config.select)

    def keep(self, thresholds: Thresholds, rows=None) -> tuple[jax.Array, jax.Array]:
        """Indices and counts of the tokens that are kept; in kv heads bool [B,K] alone, if `rows` is not None."""
        indices, counts = keep_by_thresholds(
            self._noisy, thresholds, self._cache.length, implementation=self._config.select
        )
        return indices, counts if rows is None else jnp.where(rows, counts, 0)

    def attend(self, indices, counts, thresholds: Thresholds):
        """`verified_attention` over a list."""
        return verified_attention(
            self._query, self._cache.keys, self._cache.values, indices, counts, self._noisy, self.mass, thresholds,
            softmax_scale=self._softmax_scale, implementation=self._config.attend,
        )  # fmt: skip
