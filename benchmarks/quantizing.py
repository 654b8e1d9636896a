"""Time of making codes."""

import functools

import jax

from benchmarks import timing
from rabitq_jax import RaBitQConfig
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import LayerCache
from rabitq_jax.codes import update_codes


def quantizing_us(
    cache: LayerCache, config: RaBitQConfig, first_block: jax.Array, stop_block: jax.Array, *, max_blocks: int
) -> float:
    """Median kernel time, in microseconds, of making the codes of these blocks; arguments as of `update_codes`."""
    update = functools.partial(
        update_codes, interval=config.interval, max_blocks=max_blocks, implementation=config.quantize
    )
    times, kernels = timing.kernel_times(jax.jit(update), cache.keys, cache.codes, first_block, stop_block)
    # Codes are copied first, as they are not in a step or a prefill, which own their buffers.
    return sum(us for name, us in kernels.items() if "quantize_keys" in name) if on_gpu() else times.median
