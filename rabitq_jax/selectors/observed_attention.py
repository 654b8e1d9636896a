"""Attention of a prompt's queries, which the methods that learn from the prompt look at."""

import dataclasses
from typing import TYPE_CHECKING, Self

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache
    from rabitq_jax.selectors.selector import CacheShape

# Queries whose logits over the whole cache are in memory at a time.
BLOCK = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LastQueries:
    """The last W queries of a prompt that comes in chunks.

    Attributes:
      queries: [B,W,H,D], the last one in slot W - 1.
      count: int32 [B], how many there are, W at most.
      end: int32 [B], the cache's length at the last one, that one included.
    """

    queries: jax.Array
    count: jax.Array
    end: jax.Array

    @classmethod
    def empty(cls, shape: "CacheShape", window: int) -> Self:
        """Room for `window` queries."""
        size = (shape.batch, window, shape.num_heads, shape.head_dim)
        zeros = jnp.zeros((2, shape.batch), jnp.int32)
        return cls(queries=jnp.zeros(size, shape.dtype), count=zeros[0], end=zeros[1])

    def push(self, query: jax.Array, cache: "LayerCache", new_tokens: jax.Array) -> "LastQueries":
        """With a chunk's queries [B,N,H,D], of which the first new_tokens[b] are real; the cache holds its keys.

        Queries from before generated tokens, which are not seen here, are forgotten.
        """
        window = self.queries.shape[1]
        joined = jnp.concatenate([self.queries, query.astype(self.queries.dtype)], axis=1)
        cut = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, window, axis=0)  # noqa: E731
        queries = jax.vmap(cut)(joined, new_tokens)
        follows = cache.length - new_tokens == self.end
        count = jnp.minimum(jnp.where(follows, self.count, 0) + new_tokens, window)
        come = new_tokens > 0
        return LastQueries(
            queries=queries, count=jnp.where(come, count, self.count), end=jnp.where(come, cache.length, self.end)
        )

    def summed_attention(self, cache: "LayerCache") -> jax.Array:
        """`summed_attention` of these queries."""
        window = self.queries.shape[1]
        offset = jnp.arange(window) - window
        position = jnp.where(offset >= -self.count[:, None], self.end[:, None] + offset, -1)
        return summed_attention(self.queries, position, cache)


def summed_attention(query: jax.Array, position: jax.Array, cache: "LayerCache") -> jax.Array:
    """Causal attention weights, summed over queries and over the query heads of a kv head: float32 [B,K,T].

    Args:
      query: [B,N,H,D].
      position: int32 [B,N], the token that each query belongs to; -1 for none.
    """
    batch, chunk, heads, head_dim = query.shape
    kv_heads = cache.keys.shape[1]
    padding = -chunk % BLOCK
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    position = jnp.pad(position, ((0, 0), (0, padding)), constant_values=-1)
    blocks = (chunk + padding) // BLOCK
    grouped = query.reshape(batch, blocks, BLOCK, kv_heads, heads // kv_heads, head_dim).swapaxes(0, 1)
    position = position.reshape(batch, blocks, BLOCK).swapaxes(0, 1)

    def add_block(total, inputs):
        queries, places = inputs  # [B,BLOCK,K,G,D], [B,BLOCK]
        logits = head_dim**-0.5 * jnp.einsum(
            "bnkgd,bktd->bkgnt", queries.astype(cache.keys.dtype), cache.keys,
            precision="highest", preferred_element_type=jnp.float32,
        )  # fmt: skip
        visible = jnp.arange(cache.capacity) <= places[..., None]
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=-1)
        return total + jnp.sum(jnp.where(visible[:, None, None], weights, 0), axis=(2, 3)), None

    return jax.lax.scan(add_block, jnp.zeros(cache.keys.shape[:3], jnp.float32), (grouped, position))[0]


def chunk_positions(query: jax.Array, cache: "LayerCache", new_tokens: jax.Array) -> jax.Array:
    """int32 [B,N], the tokens of a chunk's queries [B,N,H,D] that have just been appended; -1 for padding."""
    offset = jnp.arange(query.shape[1])
    return jnp.where(offset < new_tokens[:, None], (cache.length - new_tokens)[:, None] + offset, -1)
