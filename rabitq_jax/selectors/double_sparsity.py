"""Double Sparsity: a small cache of the channels that matter, in INT4 (Yang et al., 2024, arXiv 2408.07092).

    C = the r channels of largest mean |q_c k_c|, found offline;   labels = INT4(k_C), one scale and zero a token
    score_i = <q_C, labels_i>;   S = Top-k of the scores

The paper calibrates on the Pile's validation split and has r = D / 16 channels and k = 1 / 16 of the tokens; follow-ups
use r = 16 to 32 of 128.

`calibrate` in double_sparsity_calibration.py, and `rabitq-jax calibrate`, write the channels of every layer and kv head
to a file, from a text of yours. Without it, each prompt chooses its own, from all its keys and its last queries.
Channels belong to kv heads here, whose labels are stored once: the size of a channel is mean |q_c| over all query heads
of the kv head, times mean |k_c|.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.layer_files import read_layers
from rabitq_jax.selectors.observed_attention import LastQueries
from rabitq_jax.selectors.quantized_rows import QuantizedRows, row_bytes
from rabitq_jax.selectors.selector import (
    CacheShape,
    ScoringSelector,
    Selector,
    Step,
    check_multiple,
    newest,
    set_newest,
)

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache

OBSERVED = 32
BITS = 4
# Channels of each layer and kv head: [L][K][r].
Channels = tuple[tuple[tuple[int, ...], ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """Channels int32 [B,K,r], the labels [B,K,T,r], and the queries that choose channels where none were given."""

    channels: jax.Array
    labels: QuantizedRows
    last: LastQueries | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoubleSparsity(ScoringSelector):
    """Labels of a few channels.

    Attributes:
      channels: r, a multiple of 8.
      calibrated: channels of each layer and kv head, as `calibrate` gives them, or None: each prompt's own. On a
        command line, calibrated=FILE.
      layer: the layer that this is; `for_layer` sets it.
    """

    channels: int = 16
    calibrated: Channels | None = None
    layer: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_multiple("channels", self.channels, 8)
        for heads in self.calibrated or ():
            for head in heads:
                if len(head) != self.channels:
                    raise ValueError(f"calibrated must have {self.channels} channels a kv head, got {len(head)}")

    @classmethod
    def from_arguments(cls, *, calibrated: str | None = None, **arguments):
        if calibrated is not None:
            layers = read_layers("calibrated", calibrated, "channels", depth=3)
            if not layers or not layers[0]:
                raise ValueError(
                    f"calibrated must have channels of every layer and kv head, got {layers} in {calibrated}"
                )
            arguments["calibrated"] = layers
            arguments.setdefault("channels", len(layers[0][0]))
        return super().from_arguments(**arguments)

    def for_layer(self, layer: int, num_layers: int) -> Selector:
        if layer < self.dense_layers:
            return super().for_layer(layer, num_layers)
        if self.calibrated is not None and len(self.calibrated) != num_layers:
            raise ValueError(f"calibrated must have {num_layers} layers, got {len(self.calibrated)}")
        return dataclasses.replace(self, layer=layer)

    @property
    def observes(self) -> bool:
        return self.calibrated is None

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return row_bytes(self.channels, BITS)

    def init(self, shape: CacheShape) -> Labels:
        if self.channels > shape.head_dim:
            raise ValueError(f"channels must be at most {shape.head_dim} dimensions, got {self.channels}")
        size = (shape.batch, shape.num_kv_heads, self.channels)
        channels = jnp.zeros(size, jnp.int32)
        if self.calibrated is not None:
            given = jnp.array(self.calibrated[self.layer], jnp.int32)
            if len(given) != shape.num_kv_heads:
                raise ValueError(f"calibrated must have {shape.num_kv_heads} kv heads a layer, got {len(given)}")
            if max(map(max, self.calibrated[self.layer])) >= shape.head_dim:
                raise ValueError(f"calibrated must name channels below {shape.head_dim}, the head's dimensions")
            channels = jnp.broadcast_to(given, size)
        return Labels(
            channels=channels,
            labels=QuantizedRows.empty((*shape.tokens, self.channels), BITS),
            last=None if self.calibrated is not None else LastQueries.empty(shape, OBSERVED),
        )

    def observe(self, state: Labels, cache: "LayerCache", query: jax.Array, new_tokens: jax.Array) -> Labels:
        return (
            state if state.last is None else dataclasses.replace(state, last=state.last.push(query, cache, new_tokens))
        )

    def build(self, state: Labels, cache: "LayerCache") -> Labels:
        channels = state.channels
        if state.last is not None:
            held = (jnp.arange(cache.capacity) < cache.length[:, None])[:, None, :, None]
            keys = jnp.sum(jnp.where(held, jnp.abs(cache.keys), 0), axis=2, dtype=jnp.float32)
            queries = state.last.queries.astype(jnp.float32)
            observed = (jnp.arange(OBSERVED) >= OBSERVED - state.last.count[:, None])[..., None, None]
            channels = largest_channels(jnp.where(observed, queries, 0), keys, self.channels)
        labels = jnp.take_along_axis(cache.keys, channels[:, :, None], axis=-1)
        return dataclasses.replace(state, channels=channels, labels=QuantizedRows.quantize(labels, BITS))

    def update(self, state: Labels, cache: "LayerCache", step: Step) -> Labels:
        label = jnp.take_along_axis(newest(cache.keys, cache), state.channels, axis=-1)
        write = lambda held, row: set_newest(held, row, cache)  # noqa: E731
        return dataclasses.replace(state, labels=jax.tree.map(write, state.labels, QuantizedRows.quantize(label, BITS)))

    def score(self, query: jax.Array, state: Labels, cache: "LayerCache", step: Step) -> jax.Array:
        part = jnp.take_along_axis(query, state.channels[:, :, None], axis=-1).astype(jnp.float32)
        labels = state.labels.dequantize()
        return step.softmax_scale * jnp.einsum("bkgr,bktr->bkgt", part, labels, precision="highest")


def largest_channels(queries: jax.Array, key_size: jax.Array, count: int) -> jax.Array:
    """int32 [B,K,count], ascending: the channels of largest sum |q_c| sum |k_c|.

    Args:
      queries: [B,N,H,D].
      key_size: [B,K,D], sum of |k|.
    """
    batch, _, heads, head_dim = queries.shape
    kv_heads = key_size.shape[1]
    query_size = jnp.sum(jnp.abs(queries), axis=1).reshape(batch, kv_heads, heads // kv_heads, head_dim).sum(axis=2)
    return jnp.sort(jax.lax.top_k(query_size * key_size, count)[1], axis=-1).astype(jnp.int32)
