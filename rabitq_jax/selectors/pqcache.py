"""PQCache: keys as product-quantization codes (Zhang et al., SIGMOD 2025, arXiv 2407.12820).

Keys are cut in m parts of D / m dimensions, and k-means over the prompt's keys finds 2^b centroids of each part:

    code_i,j = the centroid nearest to part j of k_i;   <q, k_i>  ~=  sum_j <q_j, centroid_j[code_i,j]>
    S = Top-k of the estimate,  u  sinks  u  window

The products <q_j, centroid> are computed once a step, 2^b m of them, and looked up for every token. The paper has m = 2
and b = 6 in most tables; its runs attend a fifth or a tenth of the prompt, of which its code takes half from the
window, and 32 sinks. It keeps keys and values in a CPU's memory, with a cache of blocks on the GPU; new tokens take the
codes of the prompt's centroids when they leave the window.

Here k-means takes a fixed number of Lloyd's iterations from keys at even distances in the prompt, in place of a budget
of time; a centroid without keys stays where it is. Sinks and window are four and 64 tokens by default. Codes are bytes,
and nothing is kept off the device.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.selector import (
    CacheShape,
    ScoringSelector,
    Step,
    check_at_least,
    newest,
    set_newest,
)

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCodes:
    """Codes of the keys, uint8 [B,K,T,m], and centroids, float32 [B,K,m,2^b,D / m]."""

    codes: jax.Array
    centroids: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PQCache(ScoringSelector):
    """Product quantization.

    Attributes:
      parts: m, which must divide the head's dimensions.
      bits: b, 8 at most.
      iterations: of k-means.
    """

    sink: int = 4
    recent: int = 64
    parts: int = 2
    bits: int = 6
    iterations: int = 10

    def __post_init__(self):
        super().__post_init__()
        for name, lowest in (("parts", 1), ("bits", 1), ("iterations", 0)):
            check_at_least(name, getattr(self, name), lowest)
        if self.bits > 8:
            raise ValueError(f"bits must be at most 8, got {self.bits}")

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return self.parts

    def init(self, shape: CacheShape) -> ProductCodes:
        if shape.head_dim % self.parts:
            raise ValueError(f"parts must divide {shape.head_dim} dimensions, got {self.parts}")
        size = (*shape.tokens[:2], self.parts, 2**self.bits, shape.head_dim // self.parts)
        return ProductCodes(
            codes=jnp.zeros((*shape.tokens, self.parts), jnp.uint8), centroids=jnp.zeros(size, jnp.float32)
        )

    def build(self, state: ProductCodes, cache: "LayerCache") -> ProductCodes:
        batch, kv_heads, tokens, _ = cache.keys.shape
        points = self._cut(cache.keys).swapaxes(2, 3).reshape(batch * kv_heads * self.parts, tokens, -1)
        length = jnp.repeat(cache.length, kv_heads * self.parts)
        # One head's distances are in memory at a time.
        centroids = jax.lax.map(lambda one: k_means(one[0], one[1], 2**self.bits, self.iterations), (points, length))
        centroids = centroids.reshape(state.centroids.shape)
        codes = jax.lax.map(lambda one: nearest(*one), (points, centroids.reshape(len(points), 2**self.bits, -1)))
        codes = codes.reshape(batch, kv_heads, self.parts, tokens).swapaxes(2, 3)
        return ProductCodes(codes=codes.astype(jnp.uint8), centroids=centroids)

    def update(self, state: ProductCodes, cache: "LayerCache", step: Step) -> ProductCodes:
        parts = self._cut(newest(cache.keys, cache))
        distance = jnp.sum((parts[..., None, :] - state.centroids) ** 2, axis=-1)
        code = jnp.argmin(distance, axis=-1)
        return dataclasses.replace(state, codes=set_newest(state.codes, code, cache))

    def score(self, query: jax.Array, state: ProductCodes, cache: "LayerCache", step: Step) -> jax.Array:
        products = jnp.einsum("bkgmd,bkmcd->bkgmc", self._cut(query), state.centroids, precision="highest")
        scores = jnp.zeros((*query.shape[:3], cache.capacity), jnp.float32)
        for part in range(self.parts):
            code = state.codes[:, :, None, :, part].astype(jnp.int32)
            scores = scores + jnp.take_along_axis(products[..., part, :], code, axis=-1)
        return step.softmax_scale * scores

    def scoring_bytes(self, cache: "LayerCache") -> jax.Array:
        kv_heads, _, head_dim = cache.keys.shape[1:]
        return super().scoring_bytes(cache) + kv_heads * 2**self.bits * head_dim * 4

    def _cut(self, x: jax.Array) -> jax.Array:
        """float32 [...,m,D / m] of [...,D]."""
        return x.astype(jnp.float32).reshape(*x.shape[:-1], self.parts, -1)


def k_means(points: jax.Array, length: jax.Array, count: int, iterations: int) -> jax.Array:
    """float32 [count,d], centroids of the first `length` points [T,d], by Lloyd's iterations from points among them at
    even distances."""
    start = points[jnp.arange(count) * length // count]
    weight = (jnp.arange(len(points)) < length).astype(jnp.float32)

    def iterate(_, centroids):
        code = nearest(points, centroids)
        total = jnp.zeros_like(centroids).at[code].add(points * weight[:, None])
        members = jnp.zeros(count).at[code].add(weight)[:, None]
        return jnp.where(members == 0, centroids, total / jnp.maximum(members, 1))

    return jax.lax.fori_loop(0, iterations, iterate, start)


def nearest(points: jax.Array, centroids: jax.Array) -> jax.Array:
    """int32 [T], the centroid [C,d] nearest to each point [T,d]."""
    dots = jnp.einsum("td,cd->tc", points, centroids, precision="highest")
    return jnp.argmin(jnp.sum(centroids**2, axis=-1) - 2 * dots, axis=-1)
