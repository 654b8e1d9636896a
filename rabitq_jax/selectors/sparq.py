"""SparQ: keys read in the query's largest channels alone (Ribar et al., ICML 2024, arXiv 2312.04985).

    c = the r channels of largest |q|;   s^ = softmax(<q_c, K_c> / sqrt(D |q_c|_1 / |q|_1))                 (step 1)
    S = Top-k of s^;   y = attention to S                                                                  (step 2)
    alpha = sum of s^ over S;   out = alpha y + (1 - alpha) mean(V)                                        (step 3)

The paper has k = 128, of which the last k / 4 tokens always, and r of 16 to 64 of 128 channels; it keeps a second copy
of K with channels in rows, so that reading r of them reads r / D of the bytes. The bytes here are counted so; the copy
is not made, and gathering channels from the rows that there are moves more on real memory.

For grouped queries one set of channels serves a kv head, by the sum of |q| over its query heads (appendix). Top-k is
each query head's own here, S the union, and alpha each query head's share of S.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.budget import Rule, TopK
from rabitq_jax.selectors.selector import Attended, CacheShape, ScoringSelector, State, Step, check_at_least, newest

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparQ(ScoringSelector):
    """The query's largest channels.

    Attributes:
      channels: r, channels that scoring reads; all where the head has fewer.
    """

    rule: Rule = TopK(budget=128)
    recent: int = 32
    channels: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_at_least("channels", self.channels, 1)

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        return min(self.channels, head_dim) * itemsize

    def init(self, shape: CacheShape) -> jax.Array:
        """float32 [B,K,D], the sum of the values."""
        return jnp.zeros((shape.batch, shape.num_kv_heads, shape.head_dim), jnp.float32)

    def build(self, state: State, cache: "LayerCache") -> jax.Array:
        held = (jnp.arange(cache.capacity) < cache.length[:, None])[:, None, :, None]
        return jnp.sum(jnp.where(held, cache.values, 0), axis=2, dtype=jnp.float32)

    def update(self, state: jax.Array, cache: "LayerCache", step: Step) -> jax.Array:
        return state + newest(cache.values, cache) * step.new_tokens[:, None, None]

    def score(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> jax.Array:
        size = jnp.abs(query.astype(jnp.float32))
        channel = jax.lax.top_k(jnp.sum(size, axis=2), min(self.channels, query.shape[-1]))[1][:, :, None]
        keys = jnp.take_along_axis(cache.keys, channel, axis=-1)
        part = jnp.take_along_axis(query, channel, axis=-1).astype(jnp.float32)
        dots = jnp.einsum("bkgr,bktr->bkgt", part, keys.astype(jnp.float32), precision="highest")
        total = jnp.sum(size, axis=-1)
        share = jnp.sum(jnp.take_along_axis(size, channel, axis=-1), axis=-1) / jnp.where(total == 0, 1, total)
        # softmax_scale is 1 / sqrt(D); a query of zeros has no share, and no scores.
        return dots * (step.softmax_scale / jnp.sqrt(jnp.where(share == 0, 1, share)))[..., None]

    def attend(self, query: jax.Array, state: jax.Array, cache: "LayerCache", step: Step) -> Attended:
        attended = super().attend(query, state, cache, step)
        held = jnp.arange(cache.capacity) < cache.length[:, None]
        # The scores of `choose` once more, which the compiler makes but once.
        scores = jnp.where(held[:, None, None], self.score(query, state, cache, step), -jnp.inf)
        weights, selection = jax.nn.softmax(scores, axis=-1), attended.selection
        listed = jnp.arange(cache.capacity) < selection.counts[..., None]
        index = jnp.where(listed, selection.indices, 0)[:, :, None]
        share = jnp.where(listed[:, :, None], jnp.take_along_axis(weights, index, axis=-1), 0)
        alpha = jnp.sum(share, axis=-1)[..., None]
        mean = (state / jnp.maximum(cache.length, 1)[:, None, None])[:, :, None]
        bytes_read = attended.bytes_read + state[0].size * state.dtype.itemsize
        return dataclasses.replace(attended, out=alpha * attended.out + (1 - alpha) * mean, bytes_read=bytes_read)
