"""Top-p selection: which cached tokens a decode step attends.

Per query head, with z the scored logits and E = exp(exact_lse) the mass of tokens that are attended in any case: tokens
in order of decreasing z, ties by position, are kept while the mass strictly before them, E included, is below
p (E + sum exp z). The token that crosses p is kept. A kv head attends the union over its query heads, the sinks and the
unquantized window.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import top_p as top_p_kernel
from rabitq_jax._dispatch import select
from rabitq_jax.token_list import list_tokens_reference

# Scores that differ by less of themselves, or less than this where they are below 1, are tied.
ROUNDING = 2.0**-19


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Tokens to attend.

    Attributes:
      indices: int32 [B,K,T], ascending; entries at or past `counts` are undefined.
      counts: int32 [B,K], sinks and window included.
      scored: int32 [B,K,G], scored tokens that each query head keeps.
      mass: float32 [B,K,G], share of the estimated mass that the query head's own tokens hold.
    """

    indices: jax.Array
    counts: jax.Array
    scored: jax.Array
    mass: jax.Array


def select_reference(scores, exact_lse, quantized, length, *, sink: int, top_p: float) -> Selection:
    """`select_top_p` by a sort of all scores: its definition."""
    position = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    is_scored = (position >= sink) & (position < quantized[:, None])  # [B,T]

    # NaN goes first, so that it is kept and shows in the output.
    z = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    z = jnp.where(is_scored[:, None, None, :], z, -jnp.inf)
    peak = jnp.maximum(jnp.max(z, axis=-1), exact_lse)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)[..., None]
    ordered = _sort_descending(z)
    mass = jnp.exp(ordered - peak)
    exact_mass = jnp.exp(exact_lse[..., None] - peak)
    total = exact_mass + jnp.sum(mass, axis=-1, keepdims=True)
    before = exact_mass + jnp.cumsum(mass, axis=-1) - mass
    keep_ordered = (ordered > -jnp.inf) & ((top_p == 1) | ~(before >= top_p * total))
    n_keep = jnp.sum(keep_ordered, axis=-1, keepdims=True, dtype=jnp.int32)

    threshold = jnp.take_along_axis(ordered, jnp.maximum(n_keep - 1, 0), axis=-1)
    threshold = jnp.where(n_keep == 0, jnp.inf, threshold)
    # XLA may reckon a score twice, for the sort and for this comparison, and round it otherwise.
    slack = jnp.where(jnp.isfinite(threshold), ROUNDING * jnp.maximum(jnp.abs(threshold), 1.0), 0.0)
    above = z > threshold + slack
    tied = (z >= threshold - slack) & ~above & (n_keep > 0)
    room = n_keep - jnp.sum(above, axis=-1, keepdims=True)
    keep = (above | (tied & (jnp.cumsum(tied, axis=-1) <= room))) & is_scored[:, None, None, :]

    indices, counts = list_tokens_reference(any_keeps(keep, is_scored), length)
    kept_mass = exact_mass[..., 0] + jnp.sum(jnp.where(keep_ordered, mass, 0), axis=-1)
    return Selection(
        indices=indices,
        counts=counts,
        scored=n_keep[..., 0],
        mass=jnp.where(total[..., 0] == 0, 1.0, kept_mass / total[..., 0]),
    )


def any_keeps(keep, is_scored):
    """The tokens that kv heads attend, bool [B,K,T]: what any of their query heads keeps, bool [B,K,G,T], and what is
    not scored, of bool [B,T]."""
    return jnp.any(keep, axis=2) | ~is_scored[:, None]


def _sort_descending(x):
    """float32, sorted along the last axis, as integers of the same order: XLA sorts those much faster on a CPU."""

    def flip(bits):
        return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    ascending = jnp.sort(flip(jax.lax.bitcast_convert_type(x, jnp.int32)), axis=-1)
    return jax.lax.bitcast_convert_type(flip(ascending[..., ::-1]), jnp.float32)


def _select_pallas(scores, exact_lse, quantized, length, *, sink: int, top_p: float) -> Selection:
    indices, counts, scored, mass = top_p_kernel.select_top_p(
        scores, exact_lse, quantized, length, sink=sink, top_p=top_p
    )
    return Selection(indices=indices, counts=counts, scored=scored, mass=mass)


IMPLEMENTATIONS = {"xla": select_reference, "pallas": _select_pallas}


def select_top_p(scores, exact_lse, quantized, length, *, sink: int, top_p: float, implementation=None) -> Selection:
    """Choose the tokens that a decode step attends.

    Scored are the tokens in [sink, quantized); exact (always attended) are [0, sink) and [quantized, length).

    Args:
      scores: float32 [B,K,G,T], estimated scaled logits; undefined outside [sink, quantized).
      exact_lse: float32 [B,K,G], log-sum-exp of the exact tokens' scaled logits, for p over all tokens; -inf for p over
        the scored tokens alone.
      quantized, length: int32 [B].
      sink: number of first tokens that are attended in any case.
      top_p: in (0, 1].
      implementation: "xla" (the definition: sorts all scores); "pallas" (no sort: bins of 1/32 nat, a superset of the
        definition's set that ends with the whole bin in which p is safely reached); None.

    Returns:
      A Selection. A score of NaN or infinity is always kept.
    """
    choose = select(IMPLEMENTATIONS, implementation, gpu="pallas")
    return choose(scores, exact_lse, quantized, length, sink=sink, top_p=top_p)
