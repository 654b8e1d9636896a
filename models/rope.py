"""Rotary position embedding in Hugging Face's convention.

Dimension i < D/2 of a head turns together with dimension i + D/2, by the angle position * inverse_frequencies[i].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, total_length: jax.Array) -> jax.Array:
    """Radians that each pair of dimensions turns from one position to the next.

    Args:
      head_dim: D, even.
      total_length: int32 [B], tokens of each sequence; "dynamic" alone depends on it.

    Returns:
      float32 [B,D/2], or [1,D/2] where every sequence has the same.
    """
    pair = np.arange(head_dim // 2)
    frequencies = rope.theta ** (-2 * pair / head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _stretch_long_wavelengths(frequencies, rope)
    static = jnp.asarray(frequencies, jnp.float32)[None]
    if rope.kind != "dynamic":
        return static
    # theta grows by growth^(D / (D-2)), so that the lowest frequency falls by `growth` and the highest stays.
    length = jnp.maximum(total_length, rope.original_max_position).astype(jnp.float32)
    growth = rope.factor * length / rope.original_max_position - (rope.factor - 1)
    return static * growth[:, None] ** jnp.asarray(-2 * pair / (head_dim - 2), jnp.float32)


def _stretch_long_wavelengths(frequencies: np.ndarray, rope: RopeConfig) -> np.ndarray:
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor)


def apply_rope(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Turn queries or keys by their positions; computed in float32.

    Args:
      x: [B,N,H,D].
      positions: int32 [B,N].
      frequencies: float32 [B,D/2] or [1,D/2], from `inverse_frequencies`.

    Returns:
      [B,N,H,D] in x's dtype.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies[:, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
