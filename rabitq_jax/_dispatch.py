"""Choice of an operation's implementation by name: a dictionary, and one rule for `None`."""

from collections.abc import Callable, Mapping

import jax


def on_gpu() -> bool:
    """True if JAX's default backend is a GPU."""
    return jax.default_backend() == "gpu"


def select(implementations: Mapping[str, Callable], name: str | None, *, gpu: str) -> Callable:
    """Return `implementations[name]`; `None` means `gpu` on a GPU and "xla" elsewhere.

    An implementation that was named is never replaced: one that cannot take the arguments raises NotImplementedError.

    Raises:
      ValueError: no implementation has that name.
    """
    if name is None:
        name = gpu if on_gpu() else "xla"
    if name not in implementations:
        raise ValueError(f"implementation must be one of {sorted(implementations)} or None, got {name!r}")
    return implementations[name]
