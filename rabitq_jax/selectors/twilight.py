"""Twilight: Top-p among the tokens that another method lets through (Lin et al., NeurIPS 2025, arXiv 2502.02770).

    S0 = what a method with a large budget B0 keeps;   w = softmax over S0 of <q, INT4(k)>
    S = the fewest tokens of S0 that hold p of w

The paper has INT4 keys with one scale and zero in FP16 a token and head, p = 0.85, and lets Quest keep B0 = 8,192
tokens, or full attention all. It finds the threshold by bisection on the weights; here it is the one of top_p.py, exact
on them.

Each query head's Top-p is among the tokens that its kv head lets through. INT4 keys are read for those alone by the
count of bytes; the XLA program reads all of them, and masks.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.budget import Rule, TopK, TopP
from rabitq_jax.selectors.full import FullAttention
from rabitq_jax.selectors.quantized_rows import QuantizedRows, row_bytes
from rabitq_jax.selectors.quest import Quest
from rabitq_jax.selectors.selector import (
    CacheShape,
    Choice,
    ScoringSelector,
    Selector,
    State,
    Step,
    everything,
    mask_of,
    newest,
    set_newest,
)

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TwilightState:
    """The state of the method before, and the keys in few bits, rows [B,K,T] of D."""

    base: State
    keys: QuantizedRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twilight(ScoringSelector):
    """Hierarchical Top-p.

    Attributes:
      base: the method that lets tokens through. On a command line, base=quest or base=full; budget=8192 is its budget.
      bits: of the keys; 2, 4 or 8.
    """

    rule: Rule = TopP(top_p=0.85)
    base: Selector = Quest(rule=TopK(budget=8192))
    bits: int = 4

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.base, Selector):
            raise ValueError(f"base must be a selector, got {self.base!r}")
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits must be 2, 4 or 8, got {self.bits!r}")

    @classmethod
    def from_arguments(cls, *, base: str = "quest", budget: int = 8192, top_p: float = 0.85, **arguments):
        bases = {"quest": Quest(rule=TopK(budget=budget)), "full": FullAttention()}
        if base not in bases:
            raise ValueError(f"base must be one of {', '.join(bases)}, got {base!r}")
        return super().from_arguments(base=bases[base], top_p=top_p, **arguments)

    @property
    def block(self) -> int:
        return self.base.block

    @property
    def observes(self) -> bool:
        return self.base.observes

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        """Of a token that the base lets through; others cost what the base reads of them."""
        return self.base.bytes_per_token(head_dim, itemsize) + row_bytes(head_dim, self.bits)

    def init(self, shape: CacheShape) -> TwilightState:
        rows = QuantizedRows.empty((*shape.tokens, shape.head_dim), self.bits)
        return TwilightState(base=self.base.init(shape), keys=rows)

    def observe(self, state: TwilightState, cache: "LayerCache", query: jax.Array, new_tokens) -> TwilightState:
        return dataclasses.replace(state, base=self.base.observe(state.base, cache, query, new_tokens))

    def build(self, state: TwilightState, cache: "LayerCache") -> TwilightState:
        keys = QuantizedRows.quantize(cache.keys, self.bits)
        return TwilightState(base=self.base.build(state.base, cache), keys=keys)

    def update(self, state: TwilightState, cache: "LayerCache", step: Step) -> TwilightState:
        row = QuantizedRows.quantize(newest(cache.keys, cache), self.bits)
        keys = jax.tree.map(lambda held, new: set_newest(held, new, cache), state.keys, row)
        return TwilightState(base=self.base.update(state.base, cache, step), keys=keys)

    def score(self, query: jax.Array, state: TwilightState, cache: "LayerCache", step: Step) -> jax.Array:
        return step.softmax_scale * jnp.einsum(
            "bkgd,bktd->bkgt", query.astype(jnp.float32), state.keys.dequantize(), precision="highest"
        )

    def choose(self, query: jax.Array, state: TwilightState, cache: "LayerCache", step: Step) -> Choice:
        if isinstance(self.base, FullAttention):
            through, base_bytes, base_state = everything(query, cache), 0, state.base
        else:
            choice = self.base.choose(query, state.base, cache, step)
            through, base_bytes, base_state = choice.selection, choice.bytes_read, choice.state
        scores = jnp.where(mask_of(through)[:, :, None], self.score(query, state, cache, step), -jnp.inf)
        row, kv_heads = row_bytes(query.shape[-1], self.bits), query.shape[1]
        always = kv_heads * (self.sink + self.window)
        scored = jnp.maximum(jnp.sum(through.counts, axis=1) - always, 0).astype(jnp.float32)
        exact = always * query.shape[-1] * cache.keys.dtype.itemsize
        return Choice(
            selection=self.select(scores, query, cache, step),
            bytes_read=base_bytes + row * scored + exact,
            state=dataclasses.replace(state, base=base_state),
        )
