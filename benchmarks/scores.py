"""Time of the proxy scores: every cached token's estimated logit, from its code.

    python -m benchmarks.scores --suite context         # writes benchmarks/results/scores.json

"bins" is the Hopper kernel, which keeps a byte of each score and counts the bytes; the others give float32 scores.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import byte_counts
from benchmarks.checks import check
from benchmarks.dense import dense_baselines
from benchmarks.exact import is_scored
from benchmarks.planting import kept_facts, planted_case, quantize, select
from benchmarks.shapes import Case
from benchmarks.suite import command, timed, weighed
from pallas_kernels import mosaic_score_bins, mosaic_top_p
from rabitq_jax import RaBitQConfig
from rabitq_jax._dispatch import on_gpu, on_hopper
from rabitq_jax.cache import LayerCache
from rabitq_jax.scores import IMPLEMENTATIONS, centroid_shift
from rabitq_jax.selection import likely_peak


def implementations(cache: LayerCache) -> list[str]:
    """What to measure here."""
    assert cache.codes is not None
    if not on_gpu():
        return ["xla"]
    takes_bins = on_hopper() and mosaic_top_p.takes(cache.codes.bits, cache.codes.key_centroids)
    return ["bins", "popcount"] if takes_bins else ["popcount"]


def measure(case: Case, config: RaBitQConfig, bandwidth: float) -> Iterator[dict]:
    query, cache = planted_case(case, config)
    inputs = score_inputs(query, cache, config)
    want = jax.jit(scores_by("xla", config))(*inputs)
    facts = kept_facts(query, cache, select(query, cache, config))
    dense = dense_baselines(query, cache, bandwidth)
    for name in implementations(cache):
        run = jax.jit(scores_by(name, config))
        if name == "bins":
            size, tolerance = 1, 1.0
            error = bins_off(run(*inputs)[0], want, inputs[-2], cache, config.sink)
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


def score_inputs(query: jax.Array, cache: LayerCache, config: RaBitQConfig) -> tuple:
    """What `scores_by` takes: levels, gain, bits, scale, bias, shift, base, quantized length."""
    codes = cache.codes
    assert codes is not None
    softmax_scale = query.shape[-1] ** -0.5
    quantized = quantize(query, cache, config)
    shift = centroid_shift(query, codes, softmax_scale)
    gain = quantized.step * softmax_scale
    base = likely_peak(quantized, gain, codes, softmax_scale, shift, config.sink, cache.quantized)
    return quantized.levels, gain, codes.bits, codes.scale, codes.bias, shift, base, cache.quantized


def scores_by(name: str, config: RaBitQConfig):
    """An implementation by name, a function of `score_inputs`."""

    def run(levels, gain, bits, scale, bias, shift, base, length):
        # Gain is step times softmax scale; the scale alone multiplies a bias, which these codes have not.
        front = levels, bits, gain, scale, bias, 1.0, shift
        if name == "bins":
            return mosaic_score_bins.score_bins(*front, base, first=config.sink, stop=length)
        return IMPLEMENTATIONS[name](*front, length=length)

    return run


def scores_off(got, want, cache: LayerCache, sink: int) -> float:
    """Largest error of a score, relative to the largest score."""
    scored = is_scored(cache, sink)
    largest = jnp.max(jnp.where(scored, jnp.abs(want), 0))
    return float(jnp.max(jnp.where(scored, jnp.abs(got - want), 0)) / largest)


def bins_off(bins, want, base, cache: LayerCache, sink: int) -> float:
    """Largest error of a bin, in bins: a score at an edge may fall on either side."""
    got = jax.lax.bitcast_convert_type(bins, jnp.uint8).reshape(want.shape).astype(jnp.int32)
    right = jnp.floor(mosaic_score_bins.BINS_PER_NAT * (base[..., None] - want)).clip(0, mosaic_score_bins.BINS - 1)
    return float(jnp.max(jnp.where(is_scored(cache, sink), jnp.abs(got - right), 0)))


main = command("scores", measure, __doc__)

if __name__ == "__main__":
    main()
