"""TidalDecode: tokens selected in a few layers, and shared by those above (Yang et al., ICLR 2025, arXiv 2410.05076).

    layers below the first selection layer:  full attention
    a selection layer:                       full attention, and S = Top-k of <q, k_i>
    a layer between selection layers:        attention to the S of the selection layer below

The paper keeps two full layers, selects in layer 2 and once more in a middle layer that it finds by experiment (13 of
32 for Llama-3-8B), and has budgets of 256 to 4,096 tokens. Each kv head shares with the kv head of its number. Here
each query head selects for itself and its kv head attends the union; a selection layer reads all keys and values, and a
sharing layer one byte a token, a mask, where a list would be read in k indices. What is missing: the paper's correction
of the cache, which now and then computes the keys and values of generated tokens anew, with full attention.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.budget import Rule, TopK
from rabitq_jax.selectors.full import FullAttention
from rabitq_jax.selectors.oracle import OracleTopK
from rabitq_jax.selectors.selector import (
    Attended,
    CacheShape,
    Choice,
    ScoringSelector,
    Selector,
    State,
    Step,
    mask_of,
    selected,
)

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class TidalDecode(ScoringSelector):
    """Selection shared between layers. `for_layer` says what a layer does: this class by itself attends nothing.

    Attributes:
      selection_layers: layers that select; those before the first attend to everything.
    """

    rule: Rule = TopK(budget=1024)
    selection_layers: tuple[int, ...] = (2, 13)

    def __post_init__(self):
        super().__post_init__()
        layers = self.selection_layers
        if not isinstance(layers, tuple) or not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(
                f"selection_layers must be layers in order, such as (2, 13), as a text 2/13 or 2/, got {layers!r}"
            )
        if self.dense_layers > layers[0]:
            raise ValueError(
                f"dense_layers must be at most the first selection layer {layers[0]}, got {self.dense_layers}"
            )

    def for_layer(self, layer: int, num_layers: int) -> Selector:
        if layer < self.selection_layers[0]:
            return FullAttention()
        kind = SelectingLayer if layer in self.selection_layers else SharingLayer
        return kind(rule=self.rule, sink=self.sink, recent=self.recent)

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectingLayer(OracleTopK):
    """Attends to everything, and leaves in its state, bool [B,K,T], what the layers above attend."""

    def init(self, shape: CacheShape) -> jax.Array:
        return jnp.zeros(shape.tokens, bool)

    def attend(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> Attended:
        kept = self.choose(query, state, cache, step).selection
        attended = FullAttention().attend(query, state, cache, step)
        return dataclasses.replace(attended, state=mask_of(kept))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharingLayer(ScoringSelector):
    """Attends what the selection layer below has left in its state, and keeps none: a loop that carried the same array
    for several layers would copy it for each."""

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return 1

    def choose(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> Choice:
        if step.previous is None:
            raise ValueError("previous is None, but this layer attends what one below has selected: pass its cache")
        bytes_read = cache.keys.shape[1] * cache.length.astype(jnp.float32)
        return Choice(selection=selected(step.previous, query, cache), bytes_read=bytes_read, state=state)
