"""Prompts that are read once and continued in several ways."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rabitq_jax import Cache, RaBitQConfig, add_codes, init_cache
from rabitq_jax.decoding import ModelDefinition
from rabitq_jax.generation import Decoder, feed_prompts
from rabitq_jax.selectors import Selector


class Prefilled:
    """A batch of prompts in a cache, but for the last token of each (int32 [B]), which is still to be fed.

    Args:
      prompts: token ids of any lengths of at least two.
      capacity: of the caches; see `rabitq_jax.round_capacity`.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], capacity: int):
        self._model, self._capacity = model, capacity
        self._before = [np.asarray(prompt[:-1], np.int32) for prompt in prompts]
        self._dense = self._read(None)
        self.last = np.array([prompt[-1] for prompt in prompts], np.int32)

    def start(self, config: RaBitQConfig | Selector | None) -> Cache:
        """A cache of its own under a configuration; None is dense."""
        observes = config.observes if isinstance(config, Selector) else config and config.query_centroid == "prompt"
        if observes:
            # What is learnt from the prompt's queries can only be had by reading the prompt again.
            return self._read(config)
        cache = self._dense if config is None else _add_codes(self._dense, config=config)
        return jax.tree.map(jnp.copy, cache)

    def _read(self, config: RaBitQConfig | Selector | None) -> Cache:
        model, batch = self._model, len(self._before)
        cache = init_cache(model.config, batch, self._capacity, config, dtype=model.dtype)
        definition, params = ModelDefinition.split(model)
        hidden, nothing = jnp.zeros((batch, model.config.hidden_size), model.dtype), np.zeros(batch, np.int32)
        return feed_prompts(definition, params, cache, hidden, self._before, nothing, config=config)[0]


_add_codes = jax.jit(add_codes, static_argnames="config")
