"""Time of exact attention over the kept tokens.

python -m benchmarks.gathered_attention --suite context    # writes benchmarks/results/gathered_attention.json
"""

import functools
from collections.abc import Iterator

import jax

from benchmarks import byte_counts
from benchmarks.checks import check, relative_error
from benchmarks.dense import dense_baselines
from benchmarks.planting import kept_facts, planted_case, select
from benchmarks.shapes import Case
from benchmarks.suite import command, timed, weighed
from rabitq_jax import RaBitQConfig
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.gathered_attention import gathered_attention, gpu_implementation

TOLERANCE = 1e-2


def measure(case: Case, config: RaBitQConfig, bandwidth: float) -> Iterator[dict]:
    query, cache = planted_case(case, config)
    selection = select(query, cache, config)
    attend = functools.partial(gathered_attention, softmax_scale=case.shape.head_dim**-0.5)
    inputs = query, cache.keys, cache.values, selection.indices, selection.counts
    run = jax.jit(attend)
    error = relative_error(run(*inputs), jax.jit(functools.partial(attend, implementation="xla"))(*inputs))
    check("gathered attention", error, TOLERANCE)
    times = timed(run, *inputs)
    moved = byte_counts.attention_bytes(cache, int(selection.counts.sum()))
    yield {
        "implementation": gpu_implementation(query, cache.keys) if on_gpu() else "xla",
        "error": error,
        **kept_facts(query, cache, selection),
        **times,
        **weighed(moved, bandwidth, times["kernel_us"]["median"]),
        "dense": dense_baselines(query, cache, bandwidth),
    }


main = command("gathered_attention", measure, __doc__)

if __name__ == "__main__":
    main()
