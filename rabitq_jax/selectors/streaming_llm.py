"""StreamingLLM: attention sinks and a sliding window (Xiao et al., ICLR 2024, arXiv 2309.17453).

    S = {0, ..., sink - 1} u {n - window, ..., n - 1},   n tokens in the cache

The paper keeps 4 sinks and 1,020 recent tokens, and numbers positions inside the cache, so that models go on beyond
the length they were trained for. Here keys keep the rotary embedding of their place in the text, as in the comparisons
of sparse attention: the method is measured as a choice of tokens, within the model's range.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.selector import Choice, Selector, State, Step, check_at_least, selected

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Selector):
    """Sinks and window.

    Attributes:
      sink: number of first tokens.
      recent: number of last tokens, the new one included.
    """

    sink: int = 4
    recent: int = 1020

    def __post_init__(self):
        super().__post_init__()
        check_at_least("sink", self.sink, 0)
        check_at_least("recent", self.recent, 1)

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return 0

    def choose(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> Choice:
        mask = jnp.broadcast_to(sinks_and_window(cache, self.sink, self.recent)[:, None], cache.keys.shape[:3])
        nothing = jnp.zeros(cache.length.shape, jnp.float32)
        return Choice(selection=selected(mask, query, cache), bytes_read=nothing, state=state)


def sinks_and_window(cache: "LayerCache", sink: int, recent: int) -> jax.Array:
    """bool [B,T]: the first and the last tokens held."""
    position = jnp.arange(cache.capacity)
    held = position < cache.length[:, None]
    return held & ((position < sink) | (position >= cache.length[:, None] - recent))
