"""Time of one layer's decode step, all of its parts together.

    python -m benchmarks.decode_attention --suite context      # writes benchmarks/results/decode_attention.json
    python -m benchmarks.decode_attention --suite context --selection certified      # ..._certified.json
    python -m benchmarks.decode_attention --suite context --method quest:page=16,budget=1024      # ..._methods.json

Kernel time is that of choosing the tokens, from the query on, and of attending to them. Wall time is that of
`attention.decode`, which appends the new token and quantizes, or updates the method's state, besides; the dense
baselines only attend. `--method` measures other methods on the cache that is planted for RaBitQ.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import get_args

import jax
import jax.numpy as jnp

from benchmarks import byte_counts, timing
from benchmarks.checks import check, check_about_as_many, check_superset, relative_error
from benchmarks.dense import dense_baselines
from benchmarks.gathered_attention import TOLERANCE
from benchmarks.methods import Method, attend, expected_output, in_layer, layer_below, timed_part, under
from benchmarks.planting import ROUNDING_KEY, kept_facts, planted_case, select
from benchmarks.quantizing import quantizing_us
from benchmarks.shapes import Case
from benchmarks.suite import command, weighed
from rabitq_jax import RaBitQConfig, attention
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import LayerCache
from rabitq_jax.config import SelectionRule

# Queries of the prompt's end that methods may learn from.
OBSERVED = 64


def measure(case: Case, config: RaBitQConfig, bandwidth: float) -> Iterator[dict]:
    query, cache = planted_case(case, config)
    selection = select(query, cache, config)
    reference = dataclasses.replace(config, scores="xla", select="xla", attend="xla")
    compare = check_superset if config.selection == "plain" else check_about_as_many
    overshoot = compare(selection, select(query, cache, reference))
    moved = byte_counts.decode_bytes(cache, config.sink, int(selection.counts.sum()))
    row = measure_step(query, cache, None, config, bandwidth, moved)
    beside = {} if config.selection == "plain" else beside_plain(query, cache, case, config, bandwidth)
    yield {
        "implementation": "kernels" if on_gpu() else "xla",
        "overshoot": overshoot,
        **row,
        **beside,
        "quantization": quantization(cache, config, row["kernel_us"]["median"]),
        "dense": dense_baselines(query, cache, bandwidth),
    }


def beside_plain(query: jax.Array, cache: LayerCache, case: Case, config: RaBitQConfig, bandwidth: float) -> dict:
    """What plain selection of as many tokens takes in the same run; and the share of heads that had a second round."""
    plain = dataclasses.replace(config, selection="plain", top_p=RaBitQConfig().top_p)
    row = measure_step(*planted_case(case, plain), None, plain, bandwidth)
    return {
        "extended": float(extended_share(query, cache, config=config)),
        "plain": {name: row[name] for name in ("kept", "kernel_us", "wall_us", "kernels_us")},
    }


@functools.partial(jax.jit, static_argnames="config")
def extended_share(query: jax.Array, cache: LayerCache, *, config: RaBitQConfig) -> jax.Array:
    key = jax.random.key(ROUNDING_KEY)
    stats = attention.attend_selected(query, cache, config, query.shape[-1] ** -0.5, key)[2]
    return jnp.mean(stats.extended)


def measure_methods(case: Case, config: RaBitQConfig, bandwidth: float, methods: tuple[str, ...]) -> Iterator[dict]:
    """Rows of methods ("quest:page=16,budget=1024"), each on the cache that is planted for RaBitQ under `config`.

    Bytes are those that a method says it reads. It sees a prompt that ends with the new token's queries, with as much
    noise in them.
    """
    query, planted = planted_case(case, config)
    cache = dataclasses.replace(planted, codes=None, quantized=jnp.zeros_like(planted.quantized), scored_values=None)
    dense = dense_baselines(query, cache, bandwidth)
    asked = query.reshape(query.shape[0], 1, -1, query.shape[-1])
    noise = jax.random.normal(jax.random.key(2), (asked.shape[0], OBSERVED, *asked.shape[2:]), asked.dtype)
    for text in methods:
        method = in_layer(text)
        below = layer_below(query, cache, asked + noise, method=method)
        row = measure_step(query, under(cache, asked + noise, method=method), below, method, bandwidth)
        yield {"implementation": text, **row, "dense": dense}


def measure_step(
    query: jax.Array, cache: LayerCache, below: LayerCache | None, method: Method, bandwidth: float,
    moved: float | None = None,
) -> dict:  # fmt: skip
    """What a row says of a step, once its output has been checked against `expected_output`.

    Args:
      query, cache, below, method: as in `benchmarks.methods.attend`.
      moved: bytes that must be moved; what the method says that it reads by default.
    """
    out, selection, bytes_read = attend(query, cache, below, method=method)
    error = relative_error(out, expected_output(query, cache, selection, method=method))
    check("decode attention", error, TOLERANCE)
    facts = kept_facts(query, cache, selection)
    if math.isnan(facts["estimated_mass"]):
        # Not every method estimates it.
        del facts["estimated_mass"]
    kernel, kernels = timing.kernel_times(functools.partial(timed_part, method=method), query, cache, below)
    return {
        "error": error,
        **facts,
        "timer": timing.timer(),
        "kernel_us": dataclasses.asdict(kernel),
        "wall_us": dataclasses.asdict(decode_wall(query, cache, below, method)),
        "kernels_us": kernels,
        **weighed(float(bytes_read.sum()) if moved is None else moved, bandwidth, kernel.median),
    }


def decode_wall(query: jax.Array, cache: LayerCache, below: LayerCache | None, method: Method) -> timing.Times:
    """Wall time of `attention.decode` in a chain of steps."""
    batch, kv_heads, group, head_dim = query.shape
    new = jax.random.normal(jax.random.key(1), (2, batch, kv_heads, head_dim), query.dtype)

    def step(_, state, new, below):
        query, cache = state
        # A model's layers share a step's key.
        key = jax.random.key(ROUNDING_KEY)
        out, cache, _ = attention.decode(query, *new, cache, method, prng_key=key, previous=below)
        return timing.after(query, out), cache

    flat = query.reshape(batch, kv_heads * group, head_dim)
    return timing.step_times(step, (flat, cache), new, below, restart=True)[0]


def quantization(cache: LayerCache, config: RaBitQConfig, step_us: float) -> dict[str, float]:
    """The lazy update: kernel time of a step that quantizes nothing and of one that quantizes a block, in microseconds,
    and their mean over an interval as a share of the step's."""
    last = cache.quantized // config.interval - 1
    idle, block = (quantizing_us(cache, config, last, last + blocks, max_blocks=1) for blocks in (0, 1))
    mean = idle + (block - idle) / config.interval
    return {"idle_us": idle, "block_us": block, "share_of_step": mean / step_us}


main = command(
    "decode_attention", measure, __doc__, selections=get_args(SelectionRule), measure_methods=measure_methods
)

if __name__ == "__main__":
    main()
