"""H2O: heavy hitters, which have had the most attention so far (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

    F_i = sum over all queries so far of the attention that token i got
    when the set S is full and a token comes:   S <- S u {new} \\ {argmin of F over S without the recent ones}

The paper keeps half of the budget for heavy hitters and half for recent tokens, 20 % of the prompt in most of its
tables. The prompt is read with full attention, and its tokens chosen at its end, as in the paper's experiments;
the rule taken strictly would drop tokens while it reads.

Here F is summed over the query heads of a kv head, whose cache holds each token once. The attention kernel does not
give out its weights, so that those of a step are computed a second time, from the keys of the kept tokens; and after a
second prompt all tokens held are candidates again.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.budget import top_k_mask
from rabitq_jax.selectors.observed_attention import chunk_positions, summed_attention
from rabitq_jax.selectors.selector import CacheShape, Choice, Selector, Step, check_at_least, selected

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeavyHitters:
    """Attention received so far, float32 [B,K,T]; and the tokens kept, bool [B,K,T]."""

    received: jax.Array
    kept: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Selector):
    """Heavy hitters and recent tokens.

    Attributes:
      budget: most tokens that a kv head attends.
      recent: last tokens among them, the new one included; half of the budget by default.
    """

    budget: int = 1024
    recent: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_at_least("budget", self.budget, 2)
        if self.recent is not None:
            check_at_least("recent", self.recent, 1)
            if self.recent > self.budget:
                raise ValueError(f"recent must be at most budget {self.budget}, got {self.recent}")

    @property
    def window(self) -> int:
        """Last tokens that are always attended."""
        return self.budget // 2 if self.recent is None else self.recent

    @property
    def observes(self) -> bool:
        return True

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        # One byte says whether a token is kept; what has been received is read of kept tokens alone.
        return 1

    def init(self, shape: CacheShape) -> HeavyHitters:
        return HeavyHitters(received=jnp.zeros(shape.tokens, jnp.float32), kept=jnp.zeros(shape.tokens, bool))

    def observe(self, state: HeavyHitters, cache: "LayerCache", query: jax.Array, new_tokens) -> HeavyHitters:
        received = state.received + summed_attention(query, chunk_positions(query, cache, new_tokens), cache)
        return dataclasses.replace(state, received=received)

    def build(self, state: HeavyHitters, cache: "LayerCache") -> HeavyHitters:
        old = self._is_old(cache)
        heavy = top_k_mask(jnp.where(old, state.received, -jnp.inf), self.budget - self.window)
        return dataclasses.replace(state, kept=heavy | self._is_recent(cache))

    def update(self, state: HeavyHitters, cache: "LayerCache", step: Step) -> HeavyHitters:
        position = jnp.arange(cache.capacity)
        kept = state.kept | (position == cache.length[:, None, None] - 1)
        candidates = jnp.where(kept & self._is_old(cache), state.received, jnp.inf)
        lightest = position == jnp.argmin(candidates, axis=-1, keepdims=True)
        full = jnp.sum(kept, axis=-1, keepdims=True) > self.budget
        return dataclasses.replace(state, kept=kept & ~(lightest & full))

    def choose(self, query: jax.Array, state: HeavyHitters, cache: "LayerCache", step: Step) -> Choice:
        logits = step.softmax_scale * jnp.einsum(
            "bkgd,bktd->bkgt", query.astype(cache.keys.dtype), cache.keys,
            precision="highest", preferred_element_type=jnp.float32,
        )  # fmt: skip
        weights = jax.nn.softmax(jnp.where(state.kept[:, :, None], logits, -jnp.inf), axis=-1)
        took_part = (step.new_tokens > 0)[:, None, None]
        received = state.received + jnp.where(took_part, jnp.sum(weights, axis=2), 0)
        selection = selected(state.kept, query, cache)
        kv_heads, _, head_dim = cache.keys.shape[1:]
        kept = jnp.sum(selection.counts.astype(jnp.float32), axis=1)
        row = head_dim * cache.keys.dtype.itemsize
        bytes_read = kv_heads * cache.length.astype(jnp.float32) + (row + received.dtype.itemsize) * kept
        return Choice(selection=selection, bytes_read=bytes_read, state=dataclasses.replace(state, received=received))

    def _is_recent(self, cache: "LayerCache") -> jax.Array:
        position, length = jnp.arange(cache.capacity), cache.length[:, None, None]
        return (position >= length - self.window) & (position < length)

    def _is_old(self, cache: "LayerCache") -> jax.Array:
        return jnp.arange(cache.capacity) < cache.length[:, None, None] - self.window
