"""Budget rules: what is kept of scores, whatever method made them.

Every query head keeps its own tokens, and a kv head attends the union over its query heads: nothing is averaged over
queries. A budget is one query head's, sinks and window included, so that a group of G heads attends up to G times as
many scored tokens.
"""

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from rabitq_jax.token_list import list_tokens
from rabitq_jax.top_p import Selection, any_keeps, select_top_p


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A budget rule."""

    @property
    def uses_mass(self) -> bool:
        """The rule needs the mass of the tokens that are attended in any case."""
        return False

    def select(self, scores, exact_lse, stop, length, *, sink: int, window: int, page: int) -> Selection:
        """Choose among tokens [sink, stop); tokens [0, sink) and [stop, length) are attended in any case.

        Args:
          scores: float32 [B,K,G,T / page], estimated scaled logits of pages of tokens; anything outside [sink, stop).
          exact_lse: float32 [B,K,G], log-sum-exp of the scaled logits of the other tokens; None unless `uses_mass`.
          stop, length: int32 [B]; stop is a multiple of page.
          sink: a multiple of page.
          window: static bound on length - stop.
          page: tokens that share a score.

        Returns:
          A Selection. `mass` is the estimated share of the attention that the query head's own tokens hold.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Rule):
    """The tokens of the highest scores, ties by position, in whole pages.

    Attributes:
      budget: most tokens that a query head keeps, sinks and the longest window included. `mass` is the share of the
        scored tokens' mass.
    """

    budget: int

    def __post_init__(self):
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
            raise ValueError(f"budget must be a positive integer, got {self.budget!r}")

    def keep(self, scores, stop, *, sink: int, window: int, page: int) -> tuple[jax.Array, jax.Array]:
        """bool [B,K,G,T / page], pages that are kept; and the scores, -inf where there is nothing to score."""
        position = page * jnp.arange(scores.shape[-1])
        is_scored = (position >= sink) & (position < stop[:, None])
        # NaN goes first, so that it is kept and shows in the output.
        scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
        scores = jnp.where(is_scored[:, None, None], scores, -jnp.inf)
        return top_k_mask(scores, max(self.budget - sink - window, 0) // page), scores

    def select(self, scores, exact_lse, stop, length, *, sink: int, window: int, page: int) -> Selection:
        del exact_lse
        keep, scores = self.keep(scores, stop, sink=sink, window=window, page=page)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        mass = jnp.exp(scores - jnp.where(peak == -jnp.inf, 0, peak))
        total = jnp.sum(mass, axis=-1)
        kept = jnp.sum(jnp.where(keep, mass, 0), axis=-1)
        keep = jnp.repeat(keep, page, axis=-1)
        position = jnp.arange(keep.shape[-1])
        is_scored = (position >= sink) & (position < stop[:, None])
        indices, counts = list_tokens(any_keeps(keep, is_scored), length)
        return Selection(
            indices=indices,
            counts=counts,
            scored=jnp.sum(keep, axis=-1, dtype=jnp.int32),
            mass=jnp.where(total == 0, 1.0, kept / total),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopP(Rule):
    """The fewest tokens that hold a share of the estimated attention to all tokens (top_p.py). Pages are taken apart.

    Attributes:
      top_p: the share, in (0, 1].
    """

    top_p: float

    def __post_init__(self):
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, numbers.Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")

    @property
    def uses_mass(self) -> bool:
        return True

    def select(self, scores, exact_lse, stop, length, *, sink: int, window: int, page: int) -> Selection:
        del window
        scores = jnp.repeat(scores, page, axis=-1)
        return select_top_p(scores, exact_lse, stop, length, sink=sink, top_p=self.top_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKThenTopP(TopP):
    """Top-p among the tokens that Top-k keeps: a share of their mass (Twilight's hierarchy, with one score for both).

    Attributes:
      budget: as in TopK.
    """

    budget: int

    def __post_init__(self):
        super().__post_init__()
        TopK(budget=self.budget)

    def select(self, scores, exact_lse, stop, length, *, sink: int, window: int, page: int) -> Selection:
        keep, scores = TopK(budget=self.budget).keep(scores, stop, sink=sink, window=window, page=page)
        scores = jnp.where(keep, scores, -jnp.inf)
        return super().select(scores, exact_lse, stop, length, sink=sink, window=window, page=page)


def make_rule(budget: int | None, top_p: float | None) -> Rule:
    """The rule of a budget, a share, or both; of one at least."""
    if budget is None:
        return TopP(top_p=1.0 if top_p is None else top_p)
    return TopK(budget=budget) if top_p is None else TopKThenTopP(budget=budget, top_p=top_p)


def top_k_mask(scores: jax.Array, count: int) -> jax.Array:
    """bool, True for the `count` highest scores of the last axis that are above -inf, ties by position."""
    if count >= scores.shape[-1]:
        return scores > -jnp.inf
    if count == 0:
        return jnp.zeros(scores.shape, bool)
    values, index = jax.lax.top_k(scores, count)
    return jnp.put_along_axis(jnp.zeros(scores.shape, bool), index, values > -jnp.inf, axis=-1, inplace=False)
