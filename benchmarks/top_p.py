"""Time of Top-p: from scores to the list of tokens that are kept.

    python -m benchmarks.top_p --suite context          # writes benchmarks/results/top_p.json

"bins" begins with what the Hopper kernel of `benchmarks.scores` leaves, a byte a score and the bytes' counts; "pallas"
begins with float32 scores.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import byte_counts
from benchmarks.checks import check_superset
from benchmarks.dense import dense_baselines
from benchmarks.planting import kept_facts, planted_case, select
from benchmarks.scores import is_scored, score_inputs, scores_by
from benchmarks.shapes import Case
from benchmarks.suite import command, timed, weighed
from pallas_kernels import top_p as top_p_kernels
from pallas_kernels.mosaic_score_bins import BINS, BINS_PER_NAT
from rabitq_jax import RaBitQConfig
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import LayerCache
from rabitq_jax.exact_logsumexp import exact_logsumexp
from rabitq_jax.top_p import Selection, select_top_p


def implementations() -> tuple[str, ...]:
    """What to measure here."""
    return ("bins", "pallas") if on_gpu() else ("xla",)


def measure(case: Case, config: RaBitQConfig, bandwidth: float) -> Iterator[dict]:
    query, cache = planted_case(case, config)
    inputs = score_inputs(query, cache, config)
    scores, base = jax.jit(scores_by("xla", config))(*inputs), inputs[-2]
    exact_lse = exact_logsumexp(
        query, cache.keys, cache.quantized, cache.length,
        sink=config.sink, window=config.window, softmax_scale=case.shape.head_dim**-0.5,
    )  # fmt: skip
    reference = jax.jit(select_by("xla", config))(exact_lse, scores, cache.quantized, cache.length)
    facts = kept_facts(query, cache, select(query, cache, config))
    dense = dense_baselines(query, cache, bandwidth)
    for name in implementations():
        if name == "bins":
            size, begin = 1, (base, *binned(scores, base, cache, config.sink))
        else:
            size, begin = 4, (scores,)
        run = jax.jit(select_by(name, config))
        arguments = exact_lse, *begin, cache.quantized, cache.length
        selection = run(*arguments)
        overshoot = check_superset(selection, reference)
        times = timed(run, *arguments)
        moved = byte_counts.selection_bytes(cache, config.sink, case.shape.group, size, int(selection.counts.sum()))
        yield {
            "implementation": name,
            "overshoot": overshoot,
            **facts,
            **times,
            **weighed(moved, bandwidth, times["kernel_us"]["median"]),
            "dense": dense,
        }


def select_by(name: str, config: RaBitQConfig):
    """An implementation by name: a function of exact_lse, what it begins with, quantized and full lengths."""
    if name == "bins":
        return functools.partial(select_from_bins, sink=config.sink, top_p=config.top_p)

    def run(exact_lse, scores, quantized, length):
        return select_top_p(
            scores, exact_lse, quantized, length, sink=config.sink, top_p=config.top_p, implementation=name
        )

    return run


def select_from_bins(exact_lse, base, bins, counts, peak, quantized, length, *, sink: int, top_p: float) -> Selection:
    """What follows the Hopper kernel in `mosaic_top_p.score_and_select`."""
    kept_bins, scored, mass = top_p_kernels.kept_bins_of(
        counts, base, peak, exact_lse, bins=BINS, bins_per_nat=BINS_PER_NAT, top_p=top_p
    )
    mark = functools.partial(top_p_kernels.mark_bins_kernel, sink=sink)
    indices, attended = top_p_kernels.list_tokens(mark, [kept_bins, bins], quantized, length, tokens=4 * bins.shape[-1])
    return Selection(indices=indices, counts=attended, scored=scored, mass=mass)


def binned(scores: jax.Array, base: jax.Array, cache: LayerCache, sink: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `mosaic_score_bins.score_bins` would give: bins int32 [B,K,G,T/4], counts int32 [B,K,G,256], peak."""
    scored = is_scored(cache, sink)
    bins = jnp.floor(BINS_PER_NAT * (base[..., None] - scores)).clip(0, BINS - 1).astype(jnp.uint8)
    count = jax.vmap(lambda bins, weights: jnp.bincount(bins, weights, length=BINS))
    weights = jnp.broadcast_to(scored, scores.shape).astype(jnp.int32)
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    counts = count(flat(bins), flat(weights)).astype(jnp.int32).reshape(*scores.shape[:3], BINS)
    packed = jax.lax.bitcast_convert_type(bins.reshape(*scores.shape[:3], -1, 4), jnp.int32)
    return packed, counts, jnp.max(jnp.where(scored, scores, -jnp.inf), axis=-1)


main = command("top_p", measure, __doc__)

if __name__ == "__main__":
    main()
