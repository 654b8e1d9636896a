"""Quest: pages of tokens, ranked by an upper bound of their logits (Tang et al., ICML 2024, arXiv 2406.10774).

A page keeps the least and the largest key of its tokens in every channel, m and M. For a query,

    score(page) = sum_d max(q_d m_d, q_d M_d)  >=  max over the page's tokens of <q, k>                   (algorithm 1)

and the pages of the highest scores are attended whole, budget / page of them.

The paper uses pages of 16 tokens, budgets of 256 to 4,096 tokens, and dense attention in the first two layers
(dense_layers=2; none here by default, as in the other methods). The page of the new token is always attended here.
Grouped queries came after the paper; here each query head ranks pages for itself, and a kv head attends the union.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.selector import CacheShape, ScoringSelector, State, Step, check_at_least

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages:
    """Least and largest key of every page, [B,K,T / page,D] in the keys' dtype; undefined in pages without tokens."""

    least: jax.Array
    largest: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest(ScoringSelector):
    """Page bounds.

    Attributes:
      page: tokens of a page. The sinks must be whole pages.
    """

    page: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_at_least("page", self.page, 1)
        if self.sink % self.page:
            raise ValueError(f"sink must be a multiple of page {self.page}, got {self.sink}")

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        return 2 * head_dim * itemsize / self.page

    def init(self, shape: CacheShape) -> Pages:
        size = (*shape.tokens[:2], shape.capacity // self.page, shape.head_dim)
        return Pages(least=jnp.zeros(size, shape.dtype), largest=jnp.zeros(size, shape.dtype))

    def build(self, state: State, cache: "LayerCache") -> Pages:
        batch, kv_heads, _, head_dim = cache.keys.shape
        paged = cache.keys.reshape(batch, kv_heads, -1, self.page, head_dim)
        held = (jnp.arange(cache.capacity) < cache.length[:, None]).reshape(batch, 1, -1, self.page, 1)
        return Pages(
            least=jnp.min(jnp.where(held, paged, jnp.inf), axis=3),
            largest=jnp.max(jnp.where(held, paged, -jnp.inf), axis=3),
        )

    def update(self, state: Pages, cache: "LayerCache", step: Step) -> Pages:
        # The page of the new token is made anew from the cache, which is right too where no token came.
        def one_sequence(keys, least, largest, length):
            page = (length - 1) // self.page
            tokens = jax.lax.dynamic_slice_in_dim(keys, page * self.page, self.page, axis=1)
            held = (page * self.page + jnp.arange(self.page) < length)[:, None]
            low = jnp.min(jnp.where(held, tokens, jnp.inf), axis=1).astype(keys.dtype)
            high = jnp.max(jnp.where(held, tokens, -jnp.inf), axis=1).astype(keys.dtype)
            return least.at[:, page].set(low), largest.at[:, page].set(high)

        least, largest = jax.vmap(one_sequence)(cache.keys, state.least, state.largest, cache.length)
        return Pages(least=least, largest=largest)

    def score(self, query: jax.Array, state: Pages, cache: "LayerCache", step: Step) -> jax.Array:
        dot = lambda q, bound: jnp.einsum(  # noqa: E731
            "bkgd,bkpd->bkgp", q.astype(bound.dtype), bound, precision="highest", preferred_element_type=jnp.float32
        )
        bound = dot(jnp.maximum(query, 0), state.largest) + dot(jnp.minimum(query, 0), state.least)
        return step.softmax_scale * bound
