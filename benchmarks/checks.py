"""What must hold before anything is timed."""

import jax
import jax.numpy as jnp

from benchmarks.exact import attended
from rabitq_jax.top_p import Selection


def check(name: str, error: float, tolerance: float) -> float:
    """The error, if it is small enough for times to mean anything.

    Raises:
      ValueError: it is not.
    """
    if not error <= tolerance:
        raise ValueError(f"error of {name} must be at most {tolerance:g} for it to be timed, got {error:g}")
    return error


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """Largest difference, over the largest number that is wanted."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))


def check_superset(selection: Selection, reference: Selection) -> float:
    """How many tokens more than the definition's are kept, as a share of those.

    Raises:
      ValueError: more than one in a thousand of the definition's tokens is missing. Fewer may be: scores that differ in
        their last bit can fall on the two sides of a threshold.
    """
    got, want = (attended(chosen.indices, chosen.counts) for chosen in (selection, reference))
    total = int(want.sum())
    check("selection (share of tokens missing)", int((want & ~got).sum()) / total, 1e-3)
    return int(selection.counts.sum()) / total - 1


def check_about_as_many(selection: Selection, reference: Selection) -> float:
    """How many tokens more than the definition's are kept, as a share of those, where thresholds lie on other grids
    and other heads may have had a second round.

    Raises:
      ValueError: they are more than twice as many, or fewer than half.
    """
    ratio = int(selection.counts.sum()) / int(reference.counts.sum())
    check("selection (times as many tokens, or as few)", max(ratio, 1 / ratio), 2)
    return ratio - 1
