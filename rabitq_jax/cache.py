"""The KV cache: exact keys and values, and the key codes beside them, as frozen pytrees."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.append_token import append_token
from rabitq_jax import rotation
from rabitq_jax._dispatch import select
from rabitq_jax.codes import KeyCodes
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.selectors.selector import CacheShape

if TYPE_CHECKING:
    from rabitq_jax.selectors import Selector

CAPACITY_UNIT = 512


class AttentionShape(Protocol):
    """What a model's configuration must say for a cache to be made for it."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's cache. Slots at or past `length` are undefined.

    Attributes:
      keys, values: [B,K,T,D], exact; keys after rotary embedding.
      codes: codes of the first `quantized` keys; None in a layer that attends densely.
      length: int32 [B], tokens held for each sequence.
      quantized: int32 [B], tokens that have codes, a multiple of the configuration's interval.
      scored_values: float32 [B,K,D], sum of the values of tokens [sink, quantized); None unless config.tail is "mean".
      state: of the selector, if there is one: a pytree.
      selector: the retrieval method of a layer without codes, static; None in a layer that attends densely.
    """

    keys: jax.Array
    values: jax.Array
    codes: KeyCodes | None
    length: jax.Array
    quantized: jax.Array
    scored_values: jax.Array | None = None
    state: Any = None
    selector: "Selector | None" = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Every layer's cache, and the seed from which their rotations were drawn (uint32 [])."""

    layers: tuple[LayerCache, ...]
    rotation_seed: jax.Array

    @property
    def length(self) -> jax.Array:
        """int32 [B], tokens held for each sequence."""
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        return self.layers[0].capacity

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopCache:
    """A `Cache` as a loop carries it: what all layers have in common is there once, not computed and copied for each.

    A program that takes this cache's buffers also returns each array once. One that returns the same lengths for every
    layer gets them mixed up with other arrays of their shape by XLA for GPUs (JAX 0.11.2).

    Attributes:
      layers: the layers' caches with None for the lengths.
      length: int32 [B].
      quantized: int32 [B], of the layers with codes.
      rotation_seed: as in `Cache`.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array
    quantized: jax.Array
    rotation_seed: jax.Array

    @classmethod
    def of(cls, layers: Sequence[LayerCache], rotation_seed: jax.Array) -> "LoopCache":
        nothing: Any = None
        coded = [layer.quantized for layer in layers if layer.codes is not None]
        return cls(
            layers=tuple(dataclasses.replace(layer, length=nothing, quantized=nothing) for layer in layers),
            length=layers[0].length,
            quantized=(coded or [layers[0].quantized])[0],
            rotation_seed=rotation_seed,
        )

    def layer_caches(self) -> tuple[LayerCache, ...]:
        """The layers' caches, which share their lengths."""
        none = jnp.zeros_like(self.quantized)
        return tuple(
            dataclasses.replace(layer, length=self.length, quantized=none if layer.codes is None else self.quantized)
            for layer in self.layers
        )

    def to_cache(self) -> Cache:
        """The Cache, for use outside of programs: each layer has lengths of its own, so that it can be donated."""
        layers = (
            dataclasses.replace(layer, length=jnp.copy(layer.length), quantized=jnp.copy(layer.quantized))
            for layer in self.layer_caches()
        )
        return Cache(layers=tuple(layers), rotation_seed=self.rotation_seed)


def round_capacity(tokens: int, config: "RaBitQConfig | Selector | None") -> int:
    """The smallest capacity that holds `tokens`: a multiple of 512 and of the quantization interval, or a selector's
    block."""
    block = 1 if config is None else config.interval if isinstance(config, RaBitQConfig) else config.block
    unit = math.lcm(CAPACITY_UNIT, block)
    return -(-tokens // unit) * unit


def init_layer_cache(
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    config: RaBitQConfig | None,
    *,
    dtype=jnp.bfloat16,
    rotation_key: jax.Array | None = None,
) -> LayerCache:
    """An empty cache of one layer.

    Args:
      config: None makes a layer that attends densely and has no codes.
      rotation_key: PRNG key of this layer's rotation; by default the one of layer 0 under config.rotation_seed.

    Raises:
      ValueError: a size is not positive, or the capacity is not a multiple of 512 and of the interval.
    """
    for name, value in (
        ("batch", batch),
        ("capacity", capacity),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
    ):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if capacity != round_capacity(capacity, config):
        raise ValueError(f"capacity must be a multiple of {round_capacity(1, config)} tokens, got {capacity}")
    codes = None if config is None else init_codes(batch, capacity, num_kv_heads, head_dim, config, rotation_key)
    kv_shape = (batch, num_kv_heads, capacity, head_dim)
    return LayerCache(
        keys=jnp.zeros(kv_shape, dtype),
        values=jnp.zeros(kv_shape, dtype),
        codes=codes,
        length=jnp.zeros((batch,), jnp.int32),
        quantized=jnp.zeros((batch,), jnp.int32),
        scored_values=None if config is None else init_scored_values(batch, num_kv_heads, head_dim, config),
    )


def init_codes(
    batch: int, capacity: int, num_kv_heads: int, head_dim: int, config: RaBitQConfig, rotation_key: jax.Array | None
) -> KeyCodes:
    """Codes of no keys yet; arguments as in `init_layer_cache`."""
    if rotation_key is None:
        rotation_key = layer_rotation_key(config.rotation_seed, 0)
    matrix = rotation.draw(rotation_key, head_dim, config.rotation)
    centroids = capacity // config.interval if config.key_centroid == "block" else 1
    tokens = (batch, num_kv_heads, capacity)
    has_query_centroid = config.query_centroid == "prompt"
    return KeyCodes(
        bits=jnp.zeros((*tokens, matrix.shape[0] // 32), jnp.uint32),
        scale=jnp.zeros(tokens, jnp.bfloat16),
        bias=jnp.zeros(tokens, jnp.bfloat16) if has_query_centroid else None,
        key_centroids=jnp.zeros((batch, num_kv_heads, centroids, head_dim), jnp.bfloat16),
        query_centroid=jnp.zeros((batch, num_kv_heads, head_dim), jnp.float32) if has_query_centroid else None,
        rotation=matrix,
    )


def init_scored_values(batch: int, num_kv_heads: int, head_dim: int, config: RaBitQConfig) -> jax.Array | None:
    """`LayerCache.scored_values` of no tokens."""
    return jnp.zeros((batch, num_kv_heads, head_dim), jnp.float32) if config.tail == "mean" else None


def layer_rotation_key(seed, layer: int) -> jax.Array:
    """PRNG key of a layer's rotation."""
    return jax.random.fold_in(jax.random.key(seed), layer)


def init_selector_cache(shape: CacheShape, selector: "Selector") -> LayerCache:
    """An empty cache of one layer under a retrieval method.

    Raises:
      ValueError: as `init_layer_cache`; or the capacity is not a multiple of the selector's block.
    """
    layer = init_layer_cache(shape.batch, shape.capacity, shape.num_kv_heads, shape.head_dim, None, dtype=shape.dtype)
    return dataclasses.replace(layer, selector=selector, state=init_state(shape, selector))


def init_state(shape: CacheShape, selector: "Selector") -> Any:
    """The selector's state for no tokens.

    Raises:
      ValueError: the capacity is not a multiple of the selector's block.
    """
    if shape.capacity % selector.block:
        raise ValueError(f"capacity must be a multiple of {selector.block} tokens, got {shape.capacity}")
    return selector.init(shape)


def init_cache(
    shape: AttentionShape, batch: int, capacity: int, config: "RaBitQConfig | Selector | None", *, dtype=jnp.bfloat16
) -> Cache:
    """An empty cache for a model; `config` None makes every layer dense.

    Raises:
      ValueError: as `init_layer_cache` and `init_selector_cache`.
    """
    if config is not None and not isinstance(config, RaBitQConfig):
        layer_shape = CacheShape(
            batch=batch, capacity=capacity, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, dtype=dtype,
        )  # fmt: skip
        selectors = (config.for_layer(layer, shape.num_layers) for layer in range(shape.num_layers))
        layers = tuple(init_selector_cache(layer_shape, selector) for selector in selectors)
        return Cache(layers=layers, rotation_seed=jnp.uint32(0))
    seed = 0 if config is None else config.rotation_seed
    layers = []
    for layer in range(shape.num_layers):
        layer_config = None if config is None or layer < config.dense_layers else config
        layers.append(
            init_layer_cache(
                batch, capacity, shape.num_kv_heads, shape.head_dim, layer_config,
                dtype=dtype, rotation_key=layer_rotation_key(seed, layer),
            )
        )  # fmt: skip
    return Cache(layers=tuple(layers), rotation_seed=jnp.uint32(seed))


def append_reference(held_keys, held_values, keys, values, length, new_tokens):
    """What `append` does to keys and values [B,K,T,D], in plain jnp: its definition."""
    offset = jnp.arange(keys.shape[1])
    slot = jnp.where(offset < new_tokens[:, None], length[:, None] + offset, held_keys.shape[2])
    sequence = jnp.arange(keys.shape[0])[:, None]
    write = lambda held, new: held.at[sequence, :, slot].set(new.astype(held.dtype), mode="drop")  # noqa: E731
    return write(held_keys, keys), write(held_values, values)


def _append_pallas(held_keys, held_values, keys, values, length, new_tokens):
    if keys.shape[1] > 1:
        raise NotImplementedError(f"the kernel appends one token, got {keys.shape[1]}")
    return append_token(held_keys, held_values, keys[:, 0], values[:, 0], length, new_tokens)


APPEND_IMPLEMENTATIONS = {"xla": append_reference, "pallas": _append_pallas}


def append(
    cache: LayerCache, keys: jax.Array, values: jax.Array, new_tokens: jax.Array, *, implementation: str | None = None
) -> LayerCache:
    """Write new tokens behind those that are held; nothing is quantized.

    Args:
      keys, values: [B,N,K,D]; the first new_tokens[b] of sequence b are real, the rest is padding and not written.
      new_tokens: int32 [B]. Tokens past the capacity are dropped: callers check the capacity before.
      implementation: "xla", "pallas" or None.

    Raises:
      NotImplementedError: the kernel takes one token.
    """
    write = select(APPEND_IMPLEMENTATIONS, implementation, gpu="pallas" if keys.shape[1] == 1 else "xla")
    held_keys, held_values = write(cache.keys, cache.values, keys, values, cache.length, new_tokens)
    return dataclasses.replace(cache, keys=held_keys, values=held_values, length=cache.length + new_tokens)
