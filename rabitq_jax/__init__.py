"""RaBitQCache in JAX: long-context decoding that reads one bit per key dimension to find the tokens worth reading."""

from rabitq_jax.attention import add_codes
from rabitq_jax.cache import Cache, init_cache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.generation import Generation, generate
from rabitq_jax.sampling import Sampling

__all__ = ["Cache", "Generation", "RaBitQConfig", "Sampling", "add_codes", "generate", "init_cache"]
