"""Choice of an operation's implementation by name: a dictionary, and one rule for `None`."""

from collections.abc import Callable, Mapping

import jax


def on_gpu() -> bool:
    """True if JAX's default backend is a GPU."""
    return jax.default_backend() == "gpu"


def on_hopper() -> bool:
    """True if JAX's default backend is an NVIDIA Hopper GPU, and JAX new enough for the Mosaic kernels."""
    return on_gpu() and jax.devices()[0].compute_capability == "9.0" and jax.__version_info__ >= (0, 11)


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
