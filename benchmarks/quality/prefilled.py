"""Prompts that have been read once, to be continued in several ways."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rabitq_jax import Cache, RaBitQConfig, add_codes, init_cache
from rabitq_jax.decoding import ModelDefinition
from rabitq_jax.generation import Decoder, feed_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A batch of prompts in a dense cache, but for the last token of each (int32 [B]), which is still to be fed."""

    cache: Cache
    last: np.ndarray

    def start(self, config: RaBitQConfig | None) -> Cache:
        """A cache of its own, with the codes of a configuration; None is dense."""
        cache = (
            self.cache if config is None else jax.jit(add_codes, static_argnames="config")(self.cache, config=config)
        )
        return jax.tree.map(jnp.copy, cache)


def prefill(
    model: Decoder, prompts: Sequence[Sequence[int]], capacity: int, config: RaBitQConfig | None = None
) -> Prefilled:
    """Read prompts, of any lengths of at least two tokens. Under a config the cache has its codes, for it alone."""
    before = [np.asarray(prompt[:-1], np.int32) for prompt in prompts]
    cache = init_cache(model.config, len(prompts), capacity, config, dtype=model.dtype)
    definition, params = ModelDefinition.split(model)
    hidden = jnp.zeros((len(prompts), model.config.hidden_size), model.dtype)
    nothing = np.zeros(len(prompts), np.int32)
    cache, _ = feed_prompts(definition, params, cache, hidden, before, nothing, config=config)
    return Prefilled(cache=cache, last=np.array([prompt[-1] for prompt in prompts], np.int32))
