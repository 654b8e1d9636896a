"""Rows of numbers in few bits: x ~= zero + scale level, with level in [0, 2^bits - 1], asymmetric, to nearest."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

WORD = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedRows:
    """Rows of n numbers.

    Attributes:
      words: uint32 [..., n bits / 32]; level i is at bit bits * (i % (32 / bits)) of word i // (32 / bits).
      zero, scale: float16 [...].
      bits: static; 1, 2, 4 or 8.
    """

    words: jax.Array
    zero: jax.Array
    scale: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, shape: tuple[int, ...], bits: int) -> Self:
        """Rows of zeros; shape [..., n]."""
        *rows, size = shape
        zero, scale = jnp.zeros(rows, jnp.float16), jnp.zeros(rows, jnp.float16)
        return cls(words=jnp.zeros((*rows, size * bits // WORD), jnp.uint32), zero=zero, scale=scale, bits=bits)

    @classmethod
    def quantize(cls, x: jax.Array, bits: int) -> Self:
        """Rows [..., n], n a multiple of 32 / bits."""
        x = x.astype(jnp.float32)
        zero = jnp.min(x, axis=-1).astype(jnp.float16)
        scale = ((jnp.max(x, axis=-1) - zero) / (2**bits - 1)).astype(jnp.float16)
        # Levels are those of the numbers that are stored.
        wide = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
        levels = jnp.clip(jnp.round((x - zero[..., None]) / wide), 0, 2**bits - 1).astype(jnp.uint32)
        levels = levels.reshape(*x.shape[:-1], -1, WORD // bits)
        words = jnp.sum(levels << (bits * jnp.arange(WORD // bits, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)
        return cls(words=words, zero=zero, scale=scale, bits=bits)

    def dequantize(self) -> jax.Array:
        """float32 [..., n]."""
        shifts = self.bits * jnp.arange(WORD // self.bits, dtype=jnp.uint32)
        levels = (self.words[..., None] >> shifts) & (2**self.bits - 1)
        levels = levels.reshape(*self.words.shape[:-1], -1).astype(jnp.float32)
        return self.zero[..., None].astype(jnp.float32) + self.scale[..., None].astype(jnp.float32) * levels


def row_bytes(size: int, bits: int) -> float:
    """Bytes of a row of `size` numbers."""
    return size * bits / 8 + 4
