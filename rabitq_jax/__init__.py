"""RaBitQCache in JAX: long-context decoding that reads one bit per key dimension to find the tokens worth reading."""

from rabitq_jax.config import RaBitQConfig

__all__ = ["RaBitQConfig"]
