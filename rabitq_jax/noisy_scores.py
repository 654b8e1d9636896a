"""What debiased and certified selection ask of estimates, answered from float32 scores."""

import functools

import jax
import jax.numpy as jnp

from rabitq_jax.cache import LayerCache
from rabitq_jax.certificate import Round, certify, summarize
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
    extended_thresholds,
    find_bulk,
    measure_masses,
)
from rabitq_jax.verified_attention import verified_attention


class NoisyScores:
    """Scores of a decode step's queries [B,K,G,D] and the size of their errors, and attention by thresholds on them.

    Arguments are those of `selection.choose_tokens`. Limits are `Thresholds` and C1 at them.
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
        self._mass = measure_masses(self._noisy, exact_lse)

    def limits(self) -> tuple[Thresholds, jax.Array]:
        """Those that the rule of the configuration chooses."""
        config = self._config
        choose = debiased_thresholds if config.selection == "debiased" else certified_thresholds
        return choose(
            self._noisy, self._mass,
            top_p=config.top_p, failure_rate=config.failure_rate, implementation=config.select,
        )  # fmt: skip

    def claimed(self, limits) -> jax.Array:
        """Share of the attention that the estimates say is kept: float32 [B,K,G]."""
        return 1 - limits[1] / jnp.where(self._mass.total == 0, 1.0, self._mass.total)

    def keep(self, limits) -> tuple[jax.Array, jax.Array]:
        """Indices and counts of the tokens that are kept."""
        return keep_by_thresholds(self._noisy, limits[0], self._cache.length, implementation=self._config.select)

    def attend(self, kept, limits) -> Round:
        """`verified_attention` over what is kept, and what follows from it."""
        (indices, counts), (thresholds, below) = kept, limits
        out, attended, own, found = verified_attention(
            self._query, self._cache.keys, self._cache.values, indices, counts, self._noisy, self._mass, thresholds,
            softmax_scale=self._softmax_scale, implementation=self._config.attend,
        )  # fmt: skip
        scored = jnp.maximum(self._cache.quantized - self._config.sink, 0)[:, None, None]
        certificate = certify(found, below, attended, own, scored, self._mass, thresholds)
        summary = jnp.broadcast_arrays(*summarize(certificate, found, counts[..., None]))
        return Round(out=out, summary=jnp.stack(summary, axis=-1))

    def extend(self, limits, first: Round, indices) -> tuple[Round, jax.Array, jax.Array]:
        """After a second round, in kv heads of which a query head was short: the round, the query heads that were, and
        indices."""
        short = first.certificate.bound < self._config.top_p
        rows = jnp.any(short, axis=-1)

        def pick(new, old):
            """The second round's where a kv head had one."""
            return jnp.where(rows.reshape(*rows.shape, *(1,) * (new.ndim - 2)), new, old)

        def attend_again(first):
            lower = self._lower(limits, first, short)
            again, counts = self.keep(lower)
            return jax.tree.map(pick, self.attend((again, jnp.where(rows, counts, 0)), lower), first)

        any_short = jnp.any(short)
        last = jax.lax.cond(any_short, attend_again, lambda first: first, first)
        # A branch copies what it passes on. So the list has one of its own, which is left out where nobody asks.
        list_again = lambda first: pick(self.keep(self._lower(limits, first, short))[0], indices)  # noqa: E731
        indices = jax.lax.cond(any_short, list_again, lambda first: indices, first)
        return last, short, indices

    def _lower(self, limits, first: Round, short) -> tuple[Thresholds, jax.Array]:
        """Limits of the second round."""
        find = functools.partial(find_bulk, self._noisy, self._mass, implementation=self._config.select)
        thresholds, below = limits
        return extended_thresholds(
            find, self._mass, thresholds, below, first.certificate, short, top_p=self._config.top_p
        )
