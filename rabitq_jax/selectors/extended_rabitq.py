"""Extended RaBitQ: keys in B bits a dimension (Gao et al., SIGMOD 2025, arXiv 2409.09913); RaBitQ if B = 1.

    x = P (k - c_k);   u in {0, ..., 2^B - 1}^D;   y = u - (2^B - 1) / 2,  the grid point of largest <y, x> / |y|
    <q, k>  ~=  |x|^2 / <y, x> <y, P q>  +  <q, c_k>

The best grid point is found as in the paper: along the ray of |x|, one coordinate after the other goes up by one, and
all (2^(B-1) - 1) D points on the way are tried. The sign bits are the highest: codes are planes of bits,
the first of which is RaBitQ's code.

The paper searches for nearest vectors; its library finds B = 4, 5 and 7 enough for recalls of about 90, 95 and 99 %
without an exact search among what was found. RaBitQCache (arXiv 2606.31519) has B = 1; its released code, p of 0.65 to
0.85 and full attention in the first two layers (dense_layers=2).

Here c_k is the mean of the prompt's keys, as in RaBitQCache, or zero; the query is not quantized, and query centroids
are zero. RaBitQConfig, which has kernels, is the one-bit method with an INT4 query and centroids of blocks; this one is
there for what more bits, or no centring, give and cost. Defaults of sinks, window and rule are RaBitQConfig's.
"""

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from rabitq_jax import rotation
from rabitq_jax.codes import pack_bits, round_to_bfloat16, unpack_signs
from rabitq_jax.selectors.budget import Rule, TopP
from rabitq_jax.selectors.selector import (
    CacheShape,
    ScoringSelector,
    Selector,
    Step,
    check_at_least,
    newest,
    set_newest,
)

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache

# Keys whose candidate codes are in memory at a time.
BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GridCodes:
    """Bit planes uint32 [B,K,T,bits,W], highest first; scale bfloat16 [B,K,T], |x|^2 / <y, x>; centroid float32
    [B,K,D]; rotation float32 [32 W,D]."""

    planes: jax.Array
    scale: jax.Array
    centroid: jax.Array
    rotation: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtendedRaBitQ(ScoringSelector):
    """Keys on a grid.

    Attributes:
      bits: B, of 1 to 8.
      key_centroid: "prompt" or "none".
      seed: of the rotation.
      layer: the layer that this is; `for_layer` sets it.
    """

    rule: Rule = TopP(top_p=0.95)
    sink: int = 16
    recent: int = 64
    bits: int = 2
    key_centroid: Literal["prompt", "none"] = "prompt"
    seed: int = 0
    layer: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_at_least("bits", self.bits, 1)
        check_at_least("seed", self.seed, 0)
        if self.bits > 8:
            raise ValueError(f"bits must be at most 8, got {self.bits}")
        if self.key_centroid not in ("prompt", "none"):
            raise ValueError(f"key_centroid must be 'prompt' or 'none', got {self.key_centroid!r}")

    def for_layer(self, layer: int, num_layers: int) -> Selector:
        if layer < self.dense_layers:
            return super().for_layer(layer, num_layers)
        return dataclasses.replace(self, layer=layer)

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del itemsize
        return self.bits * -(-head_dim // 32) * 4 + 2

    def init(self, shape: CacheShape) -> GridCodes:
        key = jax.random.fold_in(jax.random.key(self.seed), self.layer)
        matrix = rotation.draw(key, shape.head_dim, "haar")
        return GridCodes(
            planes=jnp.zeros((*shape.tokens, self.bits, matrix.shape[0] // 32), jnp.uint32),
            scale=jnp.zeros(shape.tokens, jnp.bfloat16),
            centroid=jnp.zeros((shape.batch, shape.num_kv_heads, shape.head_dim), jnp.float32),
            rotation=matrix,
        )

    def build(self, state: GridCodes, cache: "LayerCache") -> GridCodes:
        centroid = state.centroid
        if self.key_centroid == "prompt":
            held = (jnp.arange(cache.capacity) < cache.length[:, None])[:, None, :, None]
            total = jnp.sum(jnp.where(held, cache.keys, 0), axis=2, dtype=jnp.float32)
            centroid = total / jnp.maximum(cache.length, 1)[:, None, None]
        state = dataclasses.replace(state, centroid=centroid)
        batch, kv_heads, tokens, head_dim = cache.keys.shape
        blocks = cache.keys.reshape(batch, kv_heads, tokens // BLOCK, BLOCK, head_dim)
        codes = jax.lax.map(lambda keys: self._encode(keys, state), jnp.moveaxis(blocks, 2, 0))
        planes, scale = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), codes)
        return dataclasses.replace(
            state, planes=planes.reshape(state.planes.shape), scale=scale.reshape(state.scale.shape)
        )

    def update(self, state: GridCodes, cache: "LayerCache", step: Step) -> GridCodes:
        planes, scale = self._encode(newest(cache.keys, cache)[:, :, None], state)
        return dataclasses.replace(
            state,
            planes=set_newest(state.planes, planes[:, :, 0], cache),
            scale=set_newest(state.scale, scale[:, :, 0], cache),
        )

    def score(self, query: jax.Array, state: GridCodes, cache: "LayerCache", step: Step) -> jax.Array:
        query = query.astype(jnp.float32)
        rotated = jnp.einsum("bkgd,cd->bkgc", query, state.rotation, precision="highest")
        weight = 2.0 ** (self.bits - 2 - jnp.arange(self.bits))
        grid = jnp.einsum("p,bktpc->bktc", weight, unpack_signs(state.planes), precision="highest")
        dots = jnp.einsum("bkgc,bktc->bkgt", rotated, grid, precision="highest")
        shift = jnp.einsum("bkgd,bkd->bkg", query, state.centroid, precision="highest")
        return step.softmax_scale * (state.scale[:, :, None].astype(jnp.float32) * dots + shift[..., None])

    def _encode(self, keys: jax.Array, state: GridCodes) -> tuple[jax.Array, jax.Array]:
        """Planes [B,K,n,bits,W] and scale [B,K,n] of keys [B,K,n,D]."""
        residual = keys.astype(jnp.float32) - state.centroid[:, :, None]
        x = jnp.einsum("bknd,cd->bknc", residual, state.rotation, precision="highest")
        half = 2 ** (self.bits - 1)
        above = best_levels(jnp.abs(x), half)
        levels = jnp.where(x > 0, half + above, half - 1 - above)
        shifts = jnp.arange(self.bits - 1, -1, -1)[:, None]
        planes = pack_bits(((levels[..., None, :] >> shifts) & 1) > 0)
        dot = jnp.sum((above + 0.5) * jnp.abs(x), axis=-1)
        scale = jnp.where(dot == 0, 0, jnp.sum(x * x, axis=-1) / jnp.where(dot == 0, 1, dot))
        return planes, round_to_bfloat16(scale)


def best_levels(size: jax.Array, half: int) -> jax.Array:
    """int32 [...,D]: m in {0, ..., half - 1}^D with the largest <m + 1/2, size> / |m + 1/2|, for sizes [...,D] >= 0.

    m = floor(t size) for some t, and changes where t size_d is an integer j: there, coordinate d goes up to j.
    """
    if half == 1:
        return jnp.zeros(size.shape, jnp.int32)
    step = jnp.arange(1, half, dtype=jnp.float32)
    turn = (step / jnp.where(size == 0, jnp.inf, size)[..., None]).reshape(*size.shape[:-1], -1)
    turn = jnp.where(jnp.repeat(size == 0, half - 1, axis=-1), jnp.inf, turn)
    order = jnp.argsort(turn, axis=-1)
    gain = jnp.broadcast_to(size[..., None], (*size.shape, half - 1)).reshape(turn.shape)
    growth = jnp.broadcast_to(2 * step, (*size.shape, half - 1)).reshape(turn.shape)
    sorted_sum = lambda x: jnp.cumsum(jnp.take_along_axis(x, order, axis=-1), axis=-1)  # noqa: E731
    start_dot = jnp.sum(size, axis=-1, keepdims=True) / 2
    dot = jnp.concatenate([start_dot, start_dot + sorted_sum(gain)], axis=-1)
    start_norm = jnp.full_like(start_dot, size.shape[-1] / 4)
    norm = jnp.concatenate([start_norm, start_norm + sorted_sum(growth)], axis=-1)
    best = jnp.argmax(dot * dot / norm, axis=-1, keepdims=True)
    # The first `best` turns are taken.
    taken = jnp.argsort(order, axis=-1) < best
    return jnp.sum(taken.reshape(*size.shape, half - 1), axis=-1, dtype=jnp.int32)
