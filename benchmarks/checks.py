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
    """How many tokens more than the definition's are kept, as a share of those, where thresholds lie on other grids.

    Raises:
      ValueError: it is more than a fifth, or less than minus a fifth.
    """
    more = int(selection.counts.sum()) / int(reference.counts.sum()) - 1
    check("selection (share of tokens more or less)", abs(more), 0.2)
    return more
