"""The Mosaic GPU kernels: lowered anywhere, run on a Hopper GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import Shape
from pallas_kernels import mosaic_score_bins, mosaic_top_p
from rabitq_jax import attention
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.codes import pack_bits, quantize_query, update_codes
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.scores import centroid_shift, proxy_scores, proxy_scores_reference
from rabitq_jax.selection import likely_peak
from rabitq_jax.top_p import select_reference
from tests.kernel_cases import lengths, score_inputs
from tests.mosaic_emulator import Emulator
from tests.test_lowering import kernel_text

SHAPES = [
    Shape(1, 8, 4, 131072, 128),
    Shape(2, 2, 4, 1024, 128),
    Shape(3, 1, 5, 1536, 256),
    Shape(1, 2, 1, 512, 128),
    Shape(2, 2, 4, 2560, 64),
    Shape(2, 3, 8, 10240, 128),
    Shape(1, 8, 3, 4096, 64),
    Shape(1, 2, 16, 3072, 384),
]
FIRST = 16
SLACK = 1e-4


def inputs(shape, *, centroids=4, bias=False, sharpness=1.0):
    levels, bits, gain, scale, bias_values, bias_gain, shift = score_inputs(
        shape, centroids=centroids, bias=bias, seed=3
    )
    return (levels, bits, gain * sharpness, scale, bias_values, bias_gain, shift)


def ranges(shape):
    length = lengths(shape, seed=3)
    return length // 64 * 64 - 64, length


def score_bins_reference(*arguments, first, stop):
    """What score_bins does, in plain jnp."""
    *factors, base = arguments
    z = proxy_scores_reference(*factors)
    scored = (jnp.arange(z.shape[-1]) >= first) & (jnp.arange(z.shape[-1]) < stop[:, None])
    scored = jnp.broadcast_to(scored[:, None, None], z.shape)
    bins = jnp.clip(jnp.floor(8 * (base[..., None] - z)), 0, 255).astype(jnp.int32)
    counts = jnp.sum(jax.nn.one_hot(jnp.where(scored, bins, -1), 256, dtype=jnp.int32), axis=-2)
    words = jnp.sum(bins.reshape(*bins.shape[:-1], -1, 4) << jnp.array([0, 8, 16, 24]), axis=-1)
    return words, counts, jnp.max(jnp.where(scored, z, -jnp.inf), axis=-1)


def check_bins(shape, arguments, stop, score_bins):
    """Check bins, counts and peaks against the definition; returns them, the bins where tokens are scored."""
    z = proxy_scores_reference(*arguments)
    base = jnp.max(z, axis=-1) - 2
    words, counts, peak = map(np.asarray, score_bins(*arguments, base))
    want_words, _, want_peak = score_bins_reference(*arguments, base, first=FIRST, stop=stop)
    scored = (np.arange(shape.tokens) >= FIRST) & (np.arange(shape.tokens) < np.asarray(stop)[:, None])
    scored = np.broadcast_to(scored[:, None, None], z.shape)
    bins, want = words.view(np.uint8), np.asarray(want_words).view(np.uint8)
    off = np.abs(bins.astype(int) - want)
    assert off[scored].max() <= 1
    # float32 rounding decides only next to an edge.
    depth = 8 * (np.asarray(base, np.float64)[..., None] - np.asarray(z, np.float64))
    assert np.all(np.abs(depth - np.round(depth))[scored & (off == 1)] < 1e-3)
    for index in np.ndindex(counts.shape[:3]):
        np.testing.assert_array_equal(np.bincount(bins[index][scored[index]], minlength=256), counts[index])
    np.testing.assert_allclose(peak, want_peak, rtol=1e-5)
    return bins[scored], counts, peak


def check_selection(shape, sharpness, offset):
    """score_and_select, with bins that begin `offset` nats above the largest score, against the definition."""
    arguments = inputs(shape, sharpness=sharpness)
    quantized, length = ranges(shape)
    z = proxy_scores_reference(*arguments)
    exact_lse = jnp.full(z.shape[:3], -jnp.inf)
    scored = (jnp.arange(shape.tokens) >= FIRST) & (jnp.arange(shape.tokens) < quantized[:, None])
    base = jnp.max(jnp.where(scored[:, None, None], z, -jnp.inf), axis=-1) + offset
    run = jax.jit(
        lambda *a: mosaic_top_p.score_and_select(
            *a[:5], arguments[5], *a[5:8], quantized, length, sink=FIRST, top_p=0.9
        )
    )
    indices, counts, n_scored, mass = run(*arguments[:5], arguments[6], base, exact_lse)
    want = select_reference(z, exact_lse, quantized, length, sink=FIRST, top_p=0.9)
    z = np.asarray(z, np.float64)
    for b, k in np.ndindex(counts.shape):
        chosen = np.asarray(indices[b, k, : counts[b, k]])
        assert np.all(np.diff(chosen) > 0)
        missed = set(np.asarray(want.indices[b, k, : want.counts[b, k]]).tolist()) - set(chosen.tolist())
        # Where two scores differ by a rounding, the kernel may keep the other one.
        assert len(missed) <= 1
        among = np.arange(FIRST, int(quantized[b]))
        for g in range(shape.group):
            weight = np.exp(z[b, k, g, among] - z[b, k, g, among].max())
            assert weight[np.isin(among, chosen)].sum() >= 0.9 * (1 - SLACK) * weight.sum()
    assert np.all((np.asarray(mass) >= 0.9) & (np.asarray(mass) <= 1))
    if offset >= 0:
        assert np.asarray(n_scored).mean() <= 1.4 * np.asarray(want.scored).mean() + 2


@pytest.mark.parametrize(
    "shape,bias",
    [
        (Shape(2, 2, 4, 1024, 128), True),
        (Shape(1, 2, 5, 512, 64), False),
        (Shape(2, 1, 3, 512, 256), False),
        (Shape(1, 1, 9, 512, 128), False),
    ],
    ids=str,
)
def test_the_kernel_in_an_emulator(shape, bias, monkeypatch):
    """Every fragment and address of the kernel, with the instructions' layouts from the PTX manual."""
    monkeypatch.setattr(mosaic_score_bins, "m", Emulator())
    arguments = inputs(shape, bias=bias)
    stop, _ = ranges(shape)
    check_bins(shape, arguments, stop, lambda *a: mosaic_score_bins.score_bins(*a, first=FIRST, stop=stop))


def test_the_kernel_scores_nothing_where_codes_end_before_the_first_token(monkeypatch):
    monkeypatch.setattr(mosaic_score_bins, "m", Emulator())
    shape = Shape(2, 1, 2, 512, 128)
    *front, shift = inputs(shape)
    stop = jnp.array([FIRST - 8, 0])
    _, counts, peak = mosaic_score_bins.score_bins(*front, shift, jnp.zeros((2, 1, 2)), first=FIRST, stop=stop)
    assert np.all(counts == 0) and np.all(np.isneginf(peak))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_kernel_puts_a_score_that_is_no_number_into_the_best_bin(bad, monkeypatch):
    monkeypatch.setattr(mosaic_score_bins, "m", Emulator())
    shape = Shape(1, 1, 2, 512, 128)
    levels, bits, gain, _, *rest = inputs(shape)
    # Factors of 1 and a bit for every positive level: the score is not negative, and infinity stays positive.
    bits = jnp.broadcast_to(pack_bits(levels[:, :, :1] > 0), bits.shape)
    scale = jnp.ones((1, 1, 512), jnp.bfloat16).at[0, 0, 100].set(bad)
    words, counts, peak = mosaic_score_bins.score_bins(
        levels, bits, gain, scale, *rest, jnp.full((1, 1, 2), 1e4), first=FIRST, stop=jnp.array([512])
    )
    assert np.asarray(words).view(np.uint8)[0, 0, 0, 100] == 0
    assert counts[0, 0, 0, 0] == 1 and peak[0, 0, 0] == np.float32(3e38)


@pytest.mark.parametrize("offset", [-20.0, -3.0, 0.0, 5.0])
@pytest.mark.parametrize("sharpness", [0.1, 5.0])
def test_selection_from_bins(sharpness, offset, monkeypatch):
    monkeypatch.setattr(mosaic_score_bins, "score_bins", score_bins_reference)
    check_selection(Shape(2, 1, 3, 512, 128), sharpness, offset)


@pytest.mark.parametrize("deviation", [0.5, 4.0, 20.0])
def test_bins_begin_near_the_largest_score(deviation):
    """The guess from a sample is within a few deviations of the largest of normal scores, in each of 32 heads."""
    shape = Shape(2, 4, 4, 8192, 128)
    keys = jax.random.split(jax.random.key(0), 3)
    config = RaBitQConfig()
    cache = init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, config)
    assert cache.codes is not None
    held = jax.random.normal(keys[0], cache.keys.shape, jnp.bfloat16)
    query = deviation * jax.random.normal(keys[1], (2, 4, 4, 128))
    quantized = jnp.array([8192, 1024])
    codes = update_codes(held, cache.codes, jnp.zeros(2, jnp.int32), quantized // 128, interval=128, max_blocks=64)
    levels = quantize_query(query, codes.rotation, None, rounding="nearest")
    scale = 128**-0.5
    z = proxy_scores(query, levels, codes, quantized, softmax_scale=scale)
    largest = jnp.max(jnp.where((jnp.arange(8192) < quantized[:, None])[:, None, None], z, -jnp.inf), axis=-1)
    shift = centroid_shift(query, codes, scale)
    base = likely_peak(levels, levels.step * scale, codes, scale, shift, 16, quantized)
    assert np.all(np.abs(base - 2 - largest) < 2.5 * deviation)


@pytest.mark.kernel
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_score_bins_lower_inside_a_loop(shape, bias, monkeypatch):
    *front, bias_values, bias_gain, shift = inputs(shape, bias=bias)

    def run(front, bias_values, shift):
        def step(_, total):
            bins, counts, peak = mosaic_score_bins.score_bins(
                *front, bias_values, bias_gain, shift, jnp.zeros(shift.shape[:3]), first=FIRST,
                stop=jnp.full((shape.batch,), 256, jnp.int32),
            )  # fmt: skip
            return total + counts.sum() + bins.sum() + peak.sum()

        return jax.lax.fori_loop(0, 2, step, 0.0)

    assert "score_bins" in kernel_text(monkeypatch, run, front, bias_values, shift)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and JAX 0.11")
class TestOnHopper:
    @pytest.mark.parametrize("centroids,bias", [(1, True), (4, False), (16, True)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_bins_counts_and_peaks(self, shape, centroids, bias):
        arguments = inputs(shape, centroids=centroids, bias=bias)
        stop, _ = ranges(shape)
        gain = arguments[5]
        jitted = jax.jit(lambda *a: mosaic_score_bins.score_bins(*a[:5], gain, *a[5:], first=FIRST, stop=stop))
        runs = [check_bins(shape, arguments, stop, lambda *a: jitted(*a[:5], *a[6:])) for _ in range(2)]
        for first, second in zip(*runs, strict=True):
            np.testing.assert_array_equal(first, second)

    @pytest.mark.parametrize("offset", [-20.0, -3.0, 0.0, 5.0])
    @pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
    @pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
    def test_selection_is_a_superset_that_holds_the_share(self, shape, sharpness, offset):
        check_selection(shape, sharpness, offset)

    def test_decoding_at_p_one_equals_dense_attention(self):
        config = RaBitQConfig(top_p=1.0, select="mosaic")
        cache = init_layer_cache(2, 1024, 2, 128, config, dtype=jnp.bfloat16)
        dense = init_layer_cache(2, 1024, 2, 128, None, dtype=jnp.bfloat16)
        keys = jax.random.split(jax.random.key(0), 6)
        draw = lambda key, *size: jax.random.normal(key, size, jnp.bfloat16)  # noqa: E731
        prompt = draw(keys[0], 2, 900, 8, 128), draw(keys[1], 2, 900, 2, 128), draw(keys[2], 2, 900, 2, 128)
        new = draw(keys[3], 2, 8, 128), draw(keys[4], 2, 2, 128), draw(keys[5], 2, 2, 128)
        _, cache = attention.prefill(*prompt, cache, config, new_tokens=jnp.array([900, 400]))
        _, dense = attention.prefill(*prompt, dense, None, new_tokens=jnp.array([900, 400]))
        out, _, stats = attention.decode(*new, cache, config, prng_key=jax.random.key(1))
        want, _, _ = attention.decode(*new, dense, None)
        np.testing.assert_array_equal(stats.kept, [[901] * 2, [401] * 2])
        np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), atol=2e-2)
        sparse = dataclasses.replace(config, top_p=0.5)
        _, _, stats = attention.decode(*new, cache, sparse, prng_key=jax.random.key(1))
        assert np.all(stats.kept < np.array([[901], [401]])) and np.all(stats.mass >= 0.5)
