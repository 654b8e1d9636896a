"""Time of the proxy scores: every cached token's estimated logit, from its code.

    python -m benchmarks.scores --suite context         # writes benchmarks/results/scores.json

"bins" is the Hopper kernel, which keeps a byte of each score and counts the bytes; the others give float32 scores. All
begin with prepared queries.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks import byte_counts
from benchmarks.checks import check
from benchmarks.dense import dense_baselines
from benchmarks.exact import is_scored
from benchmarks.planting import ROUNDING_KEY, kept_facts, planted_case, quantize, select
from benchmarks.shapes import Case
from benchmarks.suite import command, timed, weighed
from pallas_kernels import mosaic_score_bins, mosaic_top_p
from pallas_kernels.mosaic_bins import BINS, BINS_PER_NAT, bytes_of
from pallas_kernels.prepare_query import padded_heads
from rabitq_jax import RaBitQConfig
from rabitq_jax._dispatch import on_gpu, on_hopper
from rabitq_jax.cache import LayerCache
from rabitq_jax.prepared_query import PreparedQuery, prepare_query
from rabitq_jax.scores import IMPLEMENTATIONS, centroid_shift


def takes_bins(cache: LayerCache) -> bool:
    """Whether the Hopper kernels run here, and take this cache."""
    assert cache.codes is not None
    return on_hopper() and mosaic_top_p.takes(cache.codes.bits, cache.codes.key_centroids)


def implementations(cache: LayerCache) -> list[str]:
    """What to measure here."""
    if not on_gpu():
        return ["xla"]
    return ["bins", "popcount"] if takes_bins(cache) else ["popcount"]


def measure(case: Case, config: RaBitQConfig, bandwidth: float) -> Iterator[dict]:
    query, cache = planted_case(case, config)
    run, inputs = scores_by("xla", query, cache, config)
    want = jax.jit(run)(*inputs)
    facts = kept_facts(query, cache, select(query, cache, config))
    dense = dense_baselines(query, cache, bandwidth)
    for name in implementations(cache):
        run, inputs = scores_by(name, query, cache, config)
        run = jax.jit(run)
        if name == "bins":
            size, tolerance = 1, 1.0
            error = bins_off(run(*inputs)[0], want, prepared(query, cache, config), cache, config.sink)
        else:
            size, tolerance = 4, 1e-4
            error = scores_off(run(*inputs), want, cache, config.sink)
        check(f"scores by {name!r}", error, tolerance)
        times = timed(run, *inputs)
        moved = byte_counts.score_bytes(cache, config.sink, case.shape.group, size)
        yield {
            "implementation": name,
            "error": error,
            **facts,
            **times,
            **weighed(moved, bandwidth, times["kernel_us"]["median"]),
            "dense": dense,
        }


def prepared(query: jax.Array, cache: LayerCache, config: RaBitQConfig) -> PreparedQuery:
    """The queries [B,K,G,D] as `select` prepares them."""
    batch, kv_heads, group, head_dim = query.shape
    zeros = mosaic_top_p.zeros(batch, kv_heads, padded_heads(group), cache.capacity)
    return prepare_query(
        query, cache, config, softmax_scale=head_dim**-0.5, prng_key=jax.random.key(ROUNDING_KEY), zeros=zeros
    )


def scores_by(name: str, query: jax.Array, cache: LayerCache, config: RaBitQConfig) -> tuple[Callable, tuple]:
    """An implementation by name, and its arguments. "bins" also returns the state it leaves."""
    codes = cache.codes
    assert codes is not None
    softmax_scale = query.shape[-1] ** -0.5
    if name == "bins":
        ready = prepared(query, cache, config)

        def score_bins(zeros, planes, factors, base, shift, bits, scale, bias, stop):
            state = jax.new_ref(zeros)
            bins = mosaic_score_bins.score_bins(
                planes, factors, base, shift, bits, scale, bias, softmax_scale, state,
                group=query.shape[2], first=config.sink, stop=stop,
            )  # fmt: skip
            return bins, state[...]

        front = ready.zeros, ready.planes, ready.factors, ready.base, ready.shift
        return score_bins, (*front, codes.bits, codes.scale, codes.bias, cache.quantized)

    def score(levels, gain, bits, scale, bias, shift, length):
        return IMPLEMENTATIONS[name](levels, bits, gain, scale, bias, softmax_scale, shift, length=length)

    quantized = quantize(query, cache, config)
    shift = centroid_shift(query, codes, softmax_scale)
    front = quantized.levels, quantized.step * softmax_scale, codes.bits, codes.scale, codes.bias
    return score, (*front, shift, cache.quantized)


def scores_off(got, want, cache: LayerCache, sink: int) -> float:
    """Largest error of a score, relative to the largest score."""
    scored = is_scored(cache, sink)
    largest = jnp.max(jnp.where(scored, jnp.abs(want), 0))
    return float(jnp.max(jnp.where(scored, jnp.abs(got - want), 0)) / largest)


def bins_off(bins, want, ready: PreparedQuery, cache: LayerCache, sink: int) -> float:
    """Largest error of a bin, in bins: a score at an edge may fall on either side."""
    base = ready.base[:, :, : want.shape[2]]
    got = bytes_of(bins).astype(jnp.int32)
    right = jnp.floor(BINS_PER_NAT * (base[..., None] - want)).clip(0, BINS - 1)
    return float(jnp.max(jnp.where(is_scored(cache, sink), jnp.abs(got - right), 0)))


main = command("scores", measure, __doc__)

if __name__ == "__main__":
    main()
