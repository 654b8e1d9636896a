"""Time of Top-p: from scores to the list of tokens that are kept.

    python -m benchmarks.top_p --suite context          # writes benchmarks/results/top_p.json

"bins" begins with what the Hopper kernel of `benchmarks.scores` leaves, a byte a score and the bytes' counts (which it
copies first, since it writes beside them); the others begin with float32 scores.
"""

from collections.abc import Callable, Iterator

import jax

from benchmarks import byte_counts
from benchmarks.checks import check_superset
from benchmarks.dense import dense_baselines
from benchmarks.planting import kept_facts, planted_case, select
from benchmarks.scores import prepared, scores_by, takes_bins
from benchmarks.shapes import Case
from benchmarks.suite import command, timed, weighed
from pallas_kernels import mosaic_compact
from rabitq_jax import RaBitQConfig
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import LayerCache
from rabitq_jax.exact_logsumexp import exact_logsumexp
from rabitq_jax.top_p import Selection, select_top_p


def implementations(cache: LayerCache) -> list[str]:
    """What to measure here."""
    if not on_gpu():
        return ["xla"]
    return ["bins", "pallas"] if takes_bins(cache) else ["pallas"]


def measure(case: Case, config: RaBitQConfig, bandwidth: float) -> Iterator[dict]:
    query, cache = planted_case(case, config)
    run, inputs = select_by("xla", query, cache, config)
    reference = jax.jit(run)(*inputs)
    facts = kept_facts(query, cache, select(query, cache, config))
    dense = dense_baselines(query, cache, bandwidth)
    for name in implementations(cache):
        run, inputs = select_by(name, query, cache, config)
        run = jax.jit(run)
        selection = run(*inputs)
        overshoot = check_superset(selection, reference)
        times = timed(run, *inputs)
        size = 1 if name == "bins" else 4
        moved = byte_counts.selection_bytes(cache, config.sink, case.shape.group, size, int(selection.counts.sum()))
        yield {
            "implementation": name,
            "overshoot": overshoot,
            **facts,
            **times,
            **weighed(moved, bandwidth, times["kernel_us"]["median"]),
            "dense": dense,
        }


def select_by(name: str, query: jax.Array, cache: LayerCache, config: RaBitQConfig) -> tuple[Callable, tuple]:
    """An implementation by name, and its arguments."""
    if name == "bins":
        ready = prepared(query, cache, config)
        run, inputs = scores_by("bins", query, cache, config)
        bins, state = jax.jit(run)(*inputs)

        def compact(state, bins, base, exact_lse, quantized, length):
            indices, counts, scored, mass = mosaic_compact.compact(
                bins, base, exact_lse, jax.new_ref(state), quantized, length, sink=config.sink, top_p=config.top_p
            )
            return Selection(indices=indices, counts=counts, scored=scored, mass=mass)

        return compact, (state, bins, ready.base, ready.exact_lse, cache.quantized, cache.length)

    def run_top_p(scores, exact_lse, quantized, length):
        return select_top_p(
            scores, exact_lse, quantized, length, sink=config.sink, top_p=config.top_p, implementation=name
        )

    run, inputs = scores_by("xla", query, cache, config)
    exact_lse = exact_logsumexp(
        query, cache.keys, cache.quantized, cache.length,
        sink=config.sink, window=config.window, softmax_scale=query.shape[-1] ** -0.5,
    )  # fmt: skip
    return run_top_p, (jax.jit(run)(*inputs), exact_lse, cache.quantized, cache.length)


main = command("top_p", measure, __doc__)

if __name__ == "__main__":
    main()
