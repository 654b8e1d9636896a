"""KIVI: all keys and values in 2 bits, keys by channel and values by token (Liu et al., ICML 2024, arXiv 2402.02750).

    keys:    groups of g tokens of one channel share zero and scale      K[t:t+g, d]  ~=  zero + scale level
    values:  groups of g channels of one token share them                V[t, d:d+g]  ~=  zero + scale level
    out = softmax(softmax_scale q K~^T) V~, the last tokens exact

because keys have channels of outliers, and values have not. The paper has 2 bits, g = 32 and a residual of R = 128:
keys are quantized R at a time, so that the last n mod R are exact; values once R tokens have followed them.

A cache format under full attention, in the comparison because it reads fewer bytes too. What is missing: the exact
cache stays beside it, as in all methods here, so that memory is not saved; and attention makes float32 keys and values
of the whole cache, which a fused kernel would not. The bytes are those of the format.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.dense_attention import decode_attention
from rabitq_jax.selectors.quantized_rows import QuantizedRows
from rabitq_jax.selectors.selector import (
    Attended,
    CacheShape,
    Selector,
    State,
    Step,
    check_multiple,
    everything,
    newest,
    set_newest,
)

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedCache:
    """Keys in rows [B,K,T / g,D] of g tokens, values in rows [B,K,T,D / g] of g channels."""

    keys: QuantizedRows
    values: QuantizedRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class KIVI(Selector):
    """Quantized keys and values.

    Attributes:
      bits: 1, 2, 4 or 8.
      group: g, a multiple of 32 / bits that divides the head's dimensions.
      residual: R, a multiple of g.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits must be 1, 2, 4 or 8, got {self.bits!r}")
        check_multiple("group", self.group, 32 // self.bits)
        check_multiple("residual", self.residual, self.group)

    @property
    def block(self) -> int:
        return self.group

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        """Of a quantized token, keys and values: nothing of it is read besides."""
        del itemsize
        return 2 * head_dim * (self.bits / 8 + 4 / self.group)

    def init(self, shape: CacheShape) -> QuantizedCache:
        if shape.head_dim % self.group:
            raise ValueError(f"group must divide {shape.head_dim} dimensions, got {self.group}")
        heads, rows = shape.tokens[:2], (shape.capacity // self.group, shape.head_dim, self.group)
        values = (shape.capacity, shape.head_dim // self.group, self.group)
        return QuantizedCache(
            keys=QuantizedRows.empty((*heads, *rows), self.bits),
            values=QuantizedRows.empty((*heads, *values), self.bits),
        )

    def build(self, state: State, cache: "LayerCache") -> QuantizedCache:
        # Groups that are not full yet are made again when they are.
        keys = cache.keys.reshape(*cache.keys.shape[:2], -1, self.group, cache.keys.shape[3]).swapaxes(3, 4)
        return QuantizedCache(
            keys=QuantizedRows.quantize(keys, self.bits),
            values=QuantizedRows.quantize(self._channel_groups(cache.values), self.bits),
        )

    def update(self, state: QuantizedCache, cache: "LayerCache", step: Step) -> QuantizedCache:
        def one_sequence(keys, rows, length):
            # The new token's group; of no use until the token that makes it full.
            place = (length - 1) // self.group
            tokens = jax.lax.dynamic_slice_in_dim(keys, place * self.group, self.group, axis=1)
            new = QuantizedRows.quantize(tokens.swapaxes(1, 2), self.bits)
            return jax.tree.map(lambda held, row: held.at[:, place].set(row), rows, new)

        row = QuantizedRows.quantize(self._channel_groups(newest(cache.values, cache)), self.bits)
        return QuantizedCache(
            keys=jax.vmap(one_sequence)(cache.keys, state.keys, cache.length),
            values=jax.tree.map(lambda held, new: set_newest(held, new, cache), state.values, row),
        )

    def attend(self, query: jax.Array, state: QuantizedCache, cache: "LayerCache", step: Step) -> Attended:
        keys, values = self.held(state, cache)
        out = decode_attention(
            query.astype(jnp.float32), keys, values, cache.length, softmax_scale=step.softmax_scale
        )  # fmt: skip
        kv_heads, _, head_dim = cache.keys.shape[1:]
        quantized_keys, quantized_values = self._quantized(cache)
        quantized = quantized_keys + quantized_values
        in_bits, exact = quantized.astype(jnp.float32), 2 * cache.length - quantized
        row = head_dim * cache.keys.dtype.itemsize
        bytes_read = kv_heads * (self.bytes_per_token(head_dim, 0) / 2 * in_bits + row * exact)
        return Attended(out=out, selection=everything(query, cache), bytes_read=bytes_read, state=state)

    def held(self, state: QuantizedCache, cache: "LayerCache") -> tuple[jax.Array, jax.Array]:
        """Keys and values as this format holds them, float32 [B,K,T,D]: in few bits, but for the last tokens."""
        position = jnp.arange(cache.capacity)
        mixed = lambda exact, rows, stop: jnp.where(  # noqa: E731
            (position < stop[:, None])[:, None, :, None], rows.reshape(exact.shape), exact.astype(jnp.float32)
        )
        quantized_keys, quantized_values = self._quantized(cache)
        keys = mixed(cache.keys, state.keys.dequantize().swapaxes(3, 4), quantized_keys)
        return keys, mixed(cache.values, state.values.dequantize(), quantized_values)

    def _quantized(self, cache: "LayerCache") -> tuple[jax.Array, jax.Array]:
        """int32 [B], twice: first tokens whose keys, and whose values, are in few bits."""
        return cache.length // self.residual * self.residual, jnp.maximum(cache.length - self.residual, 0)

    def _channel_groups(self, x: jax.Array) -> jax.Array:
        """[...,D / g,g] of [...,D]."""
        return x.reshape(*x.shape[:-1], -1, self.group)
