"""Choice of the next token from logits: greedy, or a random draw with temperature, top-k and top-p."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Limits apply in the order temperature, top_k, top_p, as in transformers.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token and ignores the rest.
      top_k: draw among the k most likely tokens; None for all.
      top_p: draw among the fewest most likely tokens that hold this share of the probability; None for all. Not to be
        confused with RaBitQConfig.top_p, which is a share of attention.

    Raises:
      ValueError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] or None, got {self.top_p}")


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draw one token a sequence: logits float32 [B,V] -> int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    vocabulary = logits.shape[-1]
    ordered, token = jax.lax.top_k(logits, min(sampling.top_k or vocabulary, vocabulary))
    if sampling.top_p is not None:
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        # The token that crosses top_p is kept, so that there is always one.
        ordered = jnp.where(before < sampling.top_p, ordered, -jnp.inf)
    rank = jax.random.categorical(key, ordered)
    return jnp.take_along_axis(token, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
