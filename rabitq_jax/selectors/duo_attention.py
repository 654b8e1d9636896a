"""DuoAttention: some heads attend to everything, the others to sinks and a window (Xiao et al., ICLR 2025, 2410.10819).

    retrieval heads:  S = all tokens;   streaming heads:  S = first `sink` and last `recent` tokens

The paper finds retrieval heads by training a gate a kv head, on texts with planted passkeys, so that outputs stay those
of full attention; it has 64 sinks and 256 recent tokens, and half of the kv heads (a quarter in models
without grouped queries) retrieve.

No gates are trained here, hence "style": the split is given, or measured on the prompt. Measured, the kv heads of a
layer retrieve whose last queries have the most attention outside sinks and window, a share `retrieval` of the layer's.
A split that is given may be any, as one of trained gates.
"""

import dataclasses
import math
import numbers
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.budget import top_k_mask
from rabitq_jax.selectors.layer_files import read_layers
from rabitq_jax.selectors.observed_attention import LastQueries
from rabitq_jax.selectors.selector import CacheShape, Choice, Selector, Step, check_at_least, selected
from rabitq_jax.selectors.streaming_llm import sinks_and_window

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache

OBSERVED = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSplit:
    """Heads that retrieve, bool [B,K], and the queries that say so where no split was given."""

    retrieves: jax.Array
    last: LastQueries | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuoAttention(Selector):
    """Retrieval heads and streaming heads.

    Attributes:
      sink, recent: tokens of streaming heads.
      retrieval: share of a layer's kv heads that retrieve, in [0, 1], rounded up, where the split is measured.
      heads: kv heads that retrieve, for each layer, or None: measured on the prompt. On a command line, heads=FILE, in
        JSON: {"heads": [[0, 2], [], ...]}.
      layer: the layer that this is; `for_layer` sets it.
    """

    sink: int = 64
    recent: int = 256
    retrieval: float = 0.5
    heads: tuple[tuple[int, ...], ...] | None = None
    layer: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_at_least("sink", self.sink, 0)
        check_at_least("recent", self.recent, 1)
        retrieval = self.retrieval
        if isinstance(retrieval, bool) or not isinstance(retrieval, numbers.Real) or not 0 <= retrieval <= 1:
            raise ValueError(f"retrieval must be in [0, 1], got {retrieval!r}")

    @classmethod
    def from_arguments(cls, *, heads: str | None = None, **arguments):
        if heads is not None:
            arguments["heads"] = read_layers("heads", heads, "heads", depth=2)
        return super().from_arguments(**arguments)

    def for_layer(self, layer: int, num_layers: int) -> Selector:
        if layer < self.dense_layers:
            return super().for_layer(layer, num_layers)
        if self.heads is not None and len(self.heads) != num_layers:
            raise ValueError(f"heads must name those of {num_layers} layers, got {len(self.heads)}")
        return dataclasses.replace(self, layer=layer)

    @property
    def observes(self) -> bool:
        return self.heads is None

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return 0

    def init(self, shape: CacheShape) -> HeadSplit:
        retrieves = jnp.zeros((shape.batch, shape.num_kv_heads), bool)
        if self.heads is None:
            return HeadSplit(retrieves=retrieves, last=LastQueries.empty(shape, OBSERVED))
        given = self.heads[self.layer]
        if any(not 0 <= head < shape.num_kv_heads for head in given):
            raise ValueError(f"heads must be below {shape.num_kv_heads}, got {given} in layer {self.layer}")
        return HeadSplit(retrieves=retrieves | jnp.isin(jnp.arange(shape.num_kv_heads), jnp.array(given)), last=None)

    def observe(self, state: HeadSplit, cache: "LayerCache", query: jax.Array, new_tokens: jax.Array) -> HeadSplit:
        return (
            state if state.last is None else dataclasses.replace(state, last=state.last.push(query, cache, new_tokens))
        )

    def build(self, state: HeadSplit, cache: "LayerCache") -> HeadSplit:
        if state.last is None:
            return state
        attention = state.last.summed_attention(cache)
        near = sinks_and_window(cache, self.sink, self.recent)[:, None]
        outside = jnp.sum(jnp.where(near, 0, attention), axis=-1)
        count = math.ceil(self.retrieval * outside.shape[1])
        return dataclasses.replace(state, retrieves=top_k_mask(outside, count))

    def choose(self, query: jax.Array, state: HeadSplit, cache: "LayerCache", step: Step) -> Choice:
        mask = state.retrieves[..., None] | sinks_and_window(cache, self.sink, self.recent)[:, None]
        nothing = jnp.zeros(cache.length.shape, jnp.float32)
        return Choice(selection=selected(mask, query, cache), bytes_read=nothing, state=state)
