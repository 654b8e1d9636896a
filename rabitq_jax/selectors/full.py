"""Full attention: every token, exactly.

    out = softmax(softmax_scale q K^T) V                                          (Vaswani et al., arXiv 1706.03762)

The baseline of the comparison, under the same interface; and what a layer is that another method leaves dense.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax

from rabitq_jax.dense_attention import decode_attention
from rabitq_jax.selectors.selector import Attended, Selector, State, Step, attended_bytes, everything

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullAttention(Selector):
    """Attention to every token."""

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        del head_dim, itemsize
        return 0

    def attend(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> Attended:
        selection = everything(query, cache)
        out = decode_attention(query, cache.keys, cache.values, cache.length, softmax_scale=step.softmax_scale)
        return Attended(out=out, selection=selection, bytes_read=attended_bytes(selection, cache), state=state)
