"""Calibration of Double Sparsity: the channels of every layer and kv head that matter in a text."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rabitq_jax import attention
from rabitq_jax.cache import init_cache, round_capacity
from rabitq_jax.decoding import ModelDefinition
from rabitq_jax.generation import Decoder
from rabitq_jax.selectors.double_sparsity import Channels, largest_channels
from rabitq_jax.selectors.selector import check_multiple


def calibrate(model: Decoder, tokens: Sequence[int], *, channels: int) -> Channels:
    """The channels of largest mean |q_c| times mean |k_c| over a text, in each layer and kv head.

    Args:
      model: as in `generate`.
      tokens: the text; all of it goes through the model in one call.
      channels: how many, a multiple of 8.

    Returns:
      Tuples [L][K][channels] of ascending channels, for DoubleSparsity(calibrated=...).

    Raises:
      ValueError: there are no tokens, or channels is no multiple of 8 or more than a head has.
    """
    check_multiple("channels", channels, 8)
    if len(tokens) == 0:
        raise ValueError("tokens is empty: calibration needs a text")
    if channels > model.config.head_dim:
        raise ValueError(f"channels must be at most {model.config.head_dim} dimensions, got {channels}")
    definition, params = ModelDefinition.split(model)
    found = _largest(definition, params, np.asarray(tokens, np.int32)[None], channels=channels)
    return tuple(tuple(tuple(head) for head in np.asarray(layer).tolist()) for layer in found)


@functools.partial(jax.jit, static_argnames=("definition", "channels"))
def _largest(definition: ModelDefinition, params, tokens, *, channels: int):
    model = definition.merge(params)
    size = tokens.shape[1]
    cache = init_cache(model.config, 1, round_capacity(size, None), None, dtype=model.dtype)

    def attend(layer, query, key, value, layer_cache):
        del layer
        out, layer_cache = attention.prefill(query, key, value, layer_cache, None, fresh=True)
        key_size = jnp.sum(jnp.abs(key.astype(jnp.float32)), axis=1)
        return out, layer_cache, largest_channels(query.astype(jnp.float32), key_size, channels)[0]

    positions = jnp.arange(size)[None]
    return model(tokens, positions, jnp.full((1,), size, jnp.int32), cache.layers, attend)[2]
