"""SnapKV: the prompt's end votes for the prompt tokens worth keeping (Li et al., NeurIPS 2024, arXiv 2404.14469).

With A the attention of the prompt's last W queries (the observation window) to the tokens before them,

    votes_i = sum over the window's queries of A_i;   pooled = maxpool(votes, kernel)
    S = Top-k of pooled, k = budget - W,  u  the window  u  all tokens that are generated

The paper pools by the maximum, with kernel 7 over a window of 32 queries on LongBench, and keeps 1,024 to 4,096 prompt
tokens; its code can average instead. Generated tokens are never dropped, so that the budget is one of the prompt.

Here the votes of a kv head's query heads are summed, because its cache holds each token once (the paper's models have
one query head a kv head, or their keys repeated); and after a second prompt all tokens held are voted on anew, those
that were not attended before among them.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.budget import top_k_mask
from rabitq_jax.selectors.observed_attention import LastQueries
from rabitq_jax.selectors.selector import CacheShape, Choice, Selector, Step, check_at_least, selected

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptPrompt:
    """The observation window, and what it has kept: bool [B,K,T], where tokens from prompt [B] on do not count."""

    last: LastQueries
    kept: jax.Array
    prompt: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Selector):
    """Votes of the prompt's end.

    Attributes:
      budget: most tokens of the prompt that are attended, the observation window included.
      observed: W, tokens of the observation window.
      kernel: tokens over which votes are pooled; odd.
    """

    budget: int = 1024
    observed: int = 32
    kernel: int = 7

    def __post_init__(self):
        super().__post_init__()
        check_at_least("observed", self.observed, 1)
        check_at_least("budget", self.budget, self.observed)
        check_at_least("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    @property
    def observes(self) -> bool:
        return True

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return 0

    def init(self, shape: CacheShape) -> KeptPrompt:
        return KeptPrompt(
            last=LastQueries.empty(shape, self.observed),
            kept=jnp.zeros(shape.tokens, bool),
            prompt=jnp.zeros((shape.batch,), jnp.int32),
        )

    def observe(self, state: KeptPrompt, cache: "LayerCache", query: jax.Array, new_tokens: jax.Array) -> KeptPrompt:
        return dataclasses.replace(state, last=state.last.push(query, cache, new_tokens))

    def build(self, state: KeptPrompt, cache: "LayerCache") -> KeptPrompt:
        position = jnp.arange(cache.capacity)
        window = cache.length[:, None, None] - self.observed
        votes = jnp.where(position < window, state.last.summed_attention(cache), -jnp.inf)
        pooled = jax.lax.reduce_window(votes, -jnp.inf, jax.lax.max, (1, 1, self.kernel), (1, 1, 1), "SAME")
        pooled = jnp.where(position < window, pooled, -jnp.inf)
        kept = top_k_mask(pooled, self.budget - self.observed) | (position >= window)
        return dataclasses.replace(state, kept=kept, prompt=cache.length)

    def choose(self, query: jax.Array, state: KeptPrompt, cache: "LayerCache", step: Step) -> Choice:
        generated = (jnp.arange(cache.capacity) >= state.prompt[:, None])[:, None]
        nothing = jnp.zeros(cache.length.shape, jnp.float32)
        return Choice(selection=selected(state.kept | generated, query, cache), bytes_read=nothing, state=state)
