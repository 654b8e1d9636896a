"""MagicPIG: keys sampled by hashing, and weighted by how likely they were to be (Chen et al., ICLR 2025, 2410.16179).

Every key, less the mean key c, is hashed L times to K signs of random projections. For a query,

    S = keys that share the hash of q in at least two tables
    p_i = 1 - angle(q, k_i - c) / pi;   u_i = 1 - (1 - p_i^K)^L - L p_i^K (1 - p_i^K)^(L-1)
    out = sum over S of (exp(z_i) / u_i) v_i / sum over S of exp(z_i) / u_i

u_i is the probability that key i is in S, so that numerator and denominator are estimated without bias. First and last
tokens are always attended, with u = 1.

The paper has (K, L) of (8, 75), (9, 120) and (10, 150), four sinks and a window of 64, and full attention in layers 0
and 16, of which `dense_layers` can leave out the first alone. It keeps hash tables in a CPU's memory and attends there;
a step then touches the buckets of the query's hashes alone. There are no such tables under jit with static shapes: here
every key's hashes, 2 L bytes, lie beside the cache and are compared with the query's, which the bytes count. So the
method's result is the paper's, its cost is not.

Two details differ from the paper's code: c is the mean of the whole prompt's keys, sinks and window included; and
tokens that are generated are hashed, and sampled once they leave the window, where the code attends all of them.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.selector import (
    Attended,
    CacheShape,
    Choice,
    Selector,
    Step,
    attended_bytes,
    check_at_least,
    newest,
    selected,
    set_newest,
)
from rabitq_jax.selectors.streaming_llm import sinks_and_window
from rabitq_jax.selectors.weighted_attention import weighted_attention

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hashes:
    """Hashes of the keys, uint16 [B,K,T,L]; their mean, float32 [B,K,D]; the projections, float32 [L,K bits,D]."""

    keys: jax.Array
    mean: jax.Array
    projections: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagicPIG(Selector):
    """Locality-sensitive sampling.

    Attributes:
      bits: K, signs of a hash, 16 at most.
      tables: L.
      sink, recent: first and last tokens that are always attended.
      seed: of the projections.
      layer: the layer that this is; `for_layer` sets it.
    """

    bits: int = 10
    tables: int = 150
    sink: int = 4
    recent: int = 64
    seed: int = 0
    layer: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name, lowest in (("bits", 1), ("tables", 2), ("sink", 0), ("recent", 1), ("seed", 0)):
            check_at_least(name, getattr(self, name), lowest)
        if self.bits > 16:
            raise ValueError(f"bits must be at most 16, got {self.bits}")

    def for_layer(self, layer: int, num_layers: int) -> Selector:
        if layer < self.dense_layers:
            return super().for_layer(layer, num_layers)
        return dataclasses.replace(self, layer=layer)

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return 2 * self.tables

    def init(self, shape: CacheShape) -> Hashes:
        key = jax.random.fold_in(jax.random.key(self.seed), self.layer)
        return Hashes(
            keys=jnp.zeros((*shape.tokens, self.tables), jnp.uint16),
            mean=jnp.zeros((shape.batch, shape.num_kv_heads, shape.head_dim), jnp.float32),
            projections=jax.random.normal(key, (self.tables, self.bits, shape.head_dim)),
        )

    def build(self, state: Hashes, cache: "LayerCache") -> Hashes:
        held = (jnp.arange(cache.capacity) < cache.length[:, None])[:, None, :, None]
        total = jnp.sum(jnp.where(held, cache.keys, 0), axis=2, dtype=jnp.float32)
        mean = total / jnp.maximum(cache.length, 1)[:, None, None]
        # One head's projections are in memory at a time.
        hashes = jax.lax.map(
            lambda head: hash_of(head[0].astype(jnp.float32) - head[1], state.projections),
            (jax.lax.collapse(cache.keys, 0, 2), jax.lax.collapse(mean, 0, 2)),
        )
        return dataclasses.replace(state, keys=hashes.reshape(state.keys.shape), mean=mean)

    def update(self, state: Hashes, cache: "LayerCache", step: Step) -> Hashes:
        row = hash_of(newest(cache.keys, cache).astype(jnp.float32) - state.mean, state.projections)
        return dataclasses.replace(state, keys=set_newest(state.keys, row, cache))

    def sample(self, query: jax.Array, state: Hashes, cache: "LayerCache") -> jax.Array:
        """bool [B,K,G,T], the tokens that each query head attends."""
        hashes = hash_of(query.astype(jnp.float32), state.projections)
        shared = jnp.sum(state.keys[:, :, None] == hashes[:, :, :, None], axis=-1)
        held = jnp.arange(cache.capacity) < cache.length[:, None, None, None]
        return ((shared >= 2) & held) | sinks_and_window(cache, self.sink, self.recent)[:, None, None]

    def choose(self, query: jax.Array, state: Hashes, cache: "LayerCache", step: Step) -> Choice:
        sampled = self.sample(query, state, cache)
        selection = selected(jnp.any(sampled, axis=2), query, cache)
        selection = dataclasses.replace(selection, scored=jnp.sum(sampled, axis=-1, dtype=jnp.int32))
        bytes_read = cache.keys.shape[1] * self.bytes_per_token(0, 0) * cache.length.astype(jnp.float32)
        return Choice(selection=selection, bytes_read=bytes_read, state=state)

    def attend(self, query: jax.Array, state: Hashes, cache: "LayerCache", step: Step) -> Attended:
        choice = self.choose(query, state, cache, step)
        out = weighted_attention(
            query, cache.keys, cache.values, choice.selection.indices, choice.selection.counts,
            self.log_weights(query, state, cache), softmax_scale=step.softmax_scale,
        )  # fmt: skip
        bytes_read = choice.bytes_read + attended_bytes(choice.selection, cache)
        return Attended(out=out, selection=choice.selection, bytes_read=bytes_read, state=state)

    def log_weights(self, query: jax.Array, state: Hashes, cache: "LayerCache") -> jax.Array:
        """float32 [B,K,G,T], -log u of the tokens in the sample, and -inf of the others."""
        always = sinks_and_window(cache, self.sink, self.recent)[:, None, None]
        weights = jnp.where(always, 0, -jnp.log(self.probability(query, state, cache)))
        return jnp.where(self.sample(query, state, cache), weights, -jnp.inf)

    def probability(self, query: jax.Array, state: Hashes, cache: "LayerCache") -> jax.Array:
        """float32 [B,K,G,T]: u, the probability that a token is sampled."""
        keys = cache.keys.astype(jnp.float32) - state.mean[:, :, None]
        query = query.astype(jnp.float32)
        dots = jnp.einsum("bkgd,bktd->bkgt", query, keys, precision="highest")
        size = jnp.linalg.norm(query, axis=-1)[..., None] * jnp.linalg.norm(keys, axis=-1)[:, :, None]
        cosine = jnp.clip(dots / jnp.where(size == 0, 1, size), -1, 1)
        same = (1 - jnp.arccos(cosine) / jnp.pi) ** self.bits
        # u = 1 - (1 - same)^(L - 1) (1 + (L - 1) same), in logarithms: 1 less a number near 1 has no digits left.
        others = self.tables - 1
        chance = -jnp.expm1(others * jnp.log1p(-same) + jnp.log1p(others * same))
        # What was sampled had a chance; rounding must not take it away.
        return jnp.maximum(chance, jnp.finfo(jnp.float32).tiny)


def hash_of(x: jax.Array, projections: jax.Array) -> jax.Array:
    """uint16 [...,L], the signs of the projections of [...,D]."""
    signs = jnp.einsum("...d,lkd->...lk", x, projections, precision="highest") > 0
    powers = 2 ** jnp.arange(projections.shape[1], dtype=jnp.uint32)
    return jnp.sum(signs * powers, axis=-1, dtype=jnp.uint32).astype(jnp.uint16)
