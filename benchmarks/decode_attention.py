"""Time of one layer's decode step, all of its parts together.

    python -m benchmarks.decode_attention --suite context      # writes benchmarks/results/decode_attention.json
    python -m benchmarks.decode_attention --suite context --selection certified      # ..._certified.json
    python -m benchmarks.decode_attention --suite context --method quest:page=16,budget=1024      # ..._methods.json

Kernel time is that of choosing the tokens, from the query on, and of attending to them. Wall time is that of
`attention.decode`, which appends the new token and quantizes besides; the dense baselines only attend.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import get_args

import jax

from benchmarks import byte_counts, selectors, timing
from benchmarks.checks import check, check_superset, relative_error
from benchmarks.dense import dense_baselines
from benchmarks.gathered_attention import TOLERANCE
from benchmarks.planting import ROUNDING_KEY, kept_facts, planted_case, select
from benchmarks.quantizing import quantizing_us
from benchmarks.shapes import Case
from benchmarks.suite import command, weighed
from rabitq_jax import RaBitQConfig, attention
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import LayerCache, round_capacity
from rabitq_jax.config import SelectionRule
from rabitq_jax.gathered_attention import gathered_attention
from rabitq_jax.selectors import Selector
from rabitq_jax.selectors.arguments import parse_selector
from rabitq_jax.top_p import Selection

# Queries of the prompt's end, random ones, for methods that learn from them.
OBSERVED = 64


def measure(case: Case, config: RaBitQConfig, bandwidth: float) -> Iterator[dict]:
    query, cache = planted_case(case, config)
    # Kernels of a branch inside of a CUDA graph are in no profile.
    attend = jax.jit(lambda query, cache: attend_once(query, cache, config), compiler_options=timing.NO_CUDA_GRAPHS)
    selection = select(query, cache, config)
    reference = dataclasses.replace(config, scores="xla", select="xla", attend="xla")
    overshoot = check_superset(selection, select(query, cache, reference))
    want = gathered_attention(
        query, cache.keys, cache.values, selection.indices, selection.counts,
        softmax_scale=case.shape.head_dim**-0.5, implementation="xla",
    )  # fmt: skip
    error = check("decode attention", relative_error(attend(query, cache), want), TOLERANCE)
    facts = kept_facts(query, cache, selection)
    dense = dense_baselines(query, cache, bandwidth)
    moved = byte_counts.decode_bytes(cache, config.sink, int(selection.counts.sum()))
    kernel, kernels = timing.kernel_times(attend, query, cache)
    quantizing = quantization(cache, config, kernel.median)
    wall = decode_wall(query, cache, config)
    yield {
        "implementation": "kernels" if on_gpu() else "xla",
        "error": error,
        "overshoot": overshoot,
        **facts,
        "timer": timing.timer(),
        "kernel_us": dataclasses.asdict(kernel),
        "wall_us": dataclasses.asdict(wall),
        "kernels_us": kernels,
        **weighed(moved, bandwidth, kernel.median),
        "quantization": quantizing,
        "dense": dense,
    }


def measure_methods(case: Case, methods: Sequence[str], bandwidth: float) -> Iterator[dict]:
    """Retrieval methods on one cache, which is planted so that RaBitQ keeps the case's share."""
    query, planted = planted_case(case, RaBitQConfig())
    dense = dense_baselines(query, planted, bandwidth)
    keys, values = (x.swapaxes(1, 2) for x in (planted.keys, planted.values))
    queries = jax.random.normal(jax.random.key(2), (case.shape.batch, OBSERVED, *_flat(query).shape[1:]), query.dtype)
    for method in methods:
        config = parse_selector(method)
        cache = selectors.fill(
            keys, values, queries, planted.length, config=config, capacity=round_capacity(case.shape.tokens, config)
        )
        attend = functools.partial(selectors.attend, config=config)
        out, selection, bytes_read = attend(query, cache)
        kernel, kernels = timing.kernel_times(attend, query, cache)
        facts = kept_facts(query, cache, selection)
        yield {
            "implementation": method,
            "error": check_method(config, query, cache, out, selection),
            **facts,
            "timer": timing.timer(),
            "kernel_us": dataclasses.asdict(kernel),
            "wall_us": dataclasses.asdict(decode_wall(query, cache, config)),
            "kernels_us": kernels,
            **weighed(float(bytes_read.sum()), bandwidth, kernel.median),
            "dense": dense,
        }


def check_method(config: RaBitQConfig | Selector, query, cache: LayerCache, out, selection: Selection) -> float | None:
    """Distance of the output to exact attention over the tokens chosen; None for a method with weights of its own."""
    if isinstance(config, Selector) and type(config).attend is not Selector.attend:
        return None
    want = gathered_attention(
        query, cache.keys, cache.values, selection.indices, selection.counts,
        softmax_scale=query.shape[-1] ** -0.5, implementation="xla",
    )  # fmt: skip
    return check("decode attention", relative_error(out, want), TOLERANCE)


def _flat(query: jax.Array) -> jax.Array:
    """Queries [B,K,G,D] as [B,H,D]."""
    return query.reshape(query.shape[0], -1, query.shape[-1])


def attend_once(query: jax.Array, cache: LayerCache, config: RaBitQConfig) -> jax.Array:
    """Attention of a decode step whose token is in the cache already."""
    key = jax.random.key(ROUNDING_KEY)
    return attention.attend_selected(query, cache, config, query.shape[-1] ** -0.5, key)[0]


def decode_wall(query: jax.Array, cache: LayerCache, config: RaBitQConfig | Selector) -> timing.Times:
    """Wall time of `attention.decode` in a chain of steps. It uses the cache up."""
    new = jax.random.normal(jax.random.key(1), (2, *query.shape[:2], query.shape[-1]), query.dtype)

    def step(_, state, new):
        query, cache = state
        # A model's layers share a step's key.
        out, cache, _ = attention.decode(query, *new, cache, config, prng_key=jax.random.key(ROUNDING_KEY))
        return timing.after(query, out), cache

    return timing.step_times(step, (_flat(query), cache), new)[0]


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
