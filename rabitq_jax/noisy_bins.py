"""What debiased and certified selection ask of estimates, answered from bins of scores; for Hopper GPUs.

The same questions as in noisy_scores.py. Thresholds lie on the edges of bins: those of z + sd^2 / 2, which tokens are
kept by, and of debiased logits z - sd^2 / 2, whose masses are counted. See pallas_kernels/mosaic_certified.py.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_certified
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.prepare_query import padded_heads
from rabitq_jax.cache import LayerCache
from rabitq_jax.certificate import FAR, LARGEST_LOG, PRIOR_TOKENS, Round
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.prepared_query import prepare_query
from rabitq_jax.thresholds import LEAST_DEVIATION, LEAST_SINGLE, SHARED, confidence, left_out


def rule_of(config: RaBitQConfig) -> Rule:
    certified = config.selection == "certified"
    return Rule(
        top_p=config.top_p, certified=certified, left_out=left_out(config.top_p, certified=certified),
        deviations=confidence(config.failure_rate), shared=SHARED, least_single=LEAST_SINGLE,
        least_deviation=LEAST_DEVIATION, far=FAR, prior_tokens=PRIOR_TOKENS, largest_log=LARGEST_LOG,
    )  # fmt: skip


class NoisyBins:
    """Bins of the scores of a decode step's queries [B,K,G,D], and attention by thresholds on them.

    Arguments are those of `selection.choose_tokens`. Limits are float32 [B,K,H,LIMITS].
    """

    def __init__(self, query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer: int):
        codes = cache.codes
        assert codes is not None
        self._scale = codes.scale
        self._query, self._cache, self._config, self._softmax_scale = query, cache, config, softmax_scale
        batch, kv_heads, group = query.shape[:3]
        self._rule = rule_of(config)
        heads = padded_heads(group)
        prepared = prepare_query(
            query, cache, config, softmax_scale=softmax_scale, prng_key=prng_key, layer=layer,
            zeros=mosaic_certified.zeros(batch, kv_heads, heads, cache.capacity),
        )  # fmt: skip
        self._state = jax.new_ref(prepared.zeros)
        self._bins, (indices, counts, self._limits) = mosaic_certified.score_and_select(
            prepared.planes, prepared.factors, prepared.base, prepared.shift, prepared.exact_lse, prepared.noise,
            self._state, codes.bits, codes.scale, codes.bias, softmax_scale, cache.quantized, cache.length,
            group=group, sink=config.sink, rule=self._rule,
        )  # fmt: skip
        self._kept = indices, counts

    def limits(self) -> jax.Array:
        """Those that the rule of the configuration chooses."""
        return self._limits

    def claimed(self, limits) -> jax.Array:
        """Share of the attention that the estimates say is kept: float32 [B,K,G]."""
        # Columns are cut out where they are used: what several launches take is an array of its own.
        below, total = (limits[:, :, : self._query.shape[2], i] for i in (5, 6))
        return 1 - below / jnp.where(total == 0, 1.0, total)

    def keep(self, limits) -> tuple[jax.Array, jax.Array]:
        """Indices and counts of the tokens that are kept."""
        del limits
        return self._kept

    def attend(self, kept, limits) -> Round:
        """Exact attention over what is kept, and what follows from it."""
        (indices, counts), cache, scale = kept, self._cache, self._scale
        # What a tail is added to is rounded later, and so are queries of a dtype that the kernels do not write.
        is_last = self._config.tail == "drop" and self._query.dtype.itemsize == 2
        dtype = self._query.dtype if is_last else jnp.float32
        out, summary, self._second, self._short, _ = mosaic_certified.attend(
            self._query, cache.keys, cache.values, indices, counts, self._bins, scale, cache.quantized, limits,
            self._state, softmax_scale=self._softmax_scale, sink=self._config.sink, rule=self._rule, dtype=dtype,
        )  # fmt: skip
        return Round(out=out, summary=summary)

    def extend(self, limits, first: Round, indices) -> tuple[Round, jax.Array, jax.Array]:
        """After a second round, in kv heads of which a query head was short: the round, the query heads that were, and
        indices."""
        del limits
        cache, scale = self._cache, self._scale
        out, summary = mosaic_certified.attend_again(
            self._query, cache.keys, cache.values, self._bins, scale, cache.quantized, cache.length, self._second,
            self._short, self._state, first.out, first.summary,
            softmax_scale=self._softmax_scale, sink=self._config.sink, rule=self._rule,
        )  # fmt: skip
        short = self._short[:, :, : self._query.shape[2]] > 0
        # This launch is left out where nobody asks for the list.
        again, _ = mosaic_certified.select_again(
            self._bins, self._second, self._short, scale, cache.quantized, cache.length,
            sink=self._config.sink, deviations=self._rule.deviations,
        )  # fmt: skip
        indices = jnp.where(jnp.any(short, axis=-1, keepdims=True), again, indices)
        return Round(out=out, summary=summary), short, indices
