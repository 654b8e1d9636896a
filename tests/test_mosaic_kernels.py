"""The Mosaic GPU kernels: lowered anywhere, run on a Hopper GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.checks import check_superset
from benchmarks.planting import planted_case
from benchmarks.shapes import Shape, make_case
from pallas_kernels import (
    mosaic_attention,
    mosaic_bins,
    mosaic_certificate,
    mosaic_certified_threshold,
    mosaic_chunk,
    mosaic_code_copies,
    mosaic_compact,
    mosaic_conclusion,
    mosaic_counters,
    mosaic_extend,
    mosaic_found,
    mosaic_parts,
    mosaic_prepare_query,
    mosaic_products,
    mosaic_rotation,
    mosaic_rules,
    mosaic_samples,
    mosaic_score_bins,
    mosaic_scorers,
    mosaic_top_p,
    mosaic_top_p_threshold,
    mosaic_verify,
    mosaic_warp_attention,
)
from pallas_kernels.popcount_scores import bit_planes
from pallas_kernels.prepare_query import padded_heads
from rabitq_jax import attention, prepared_query, selection
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.codes import pack_bits
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.scores import proxy_scores_reference
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


def padded(x):
    """Heads [B,K,G,...] to a multiple of 4, with zeros."""
    extra = padded_heads(x.shape[2]) - x.shape[2]
    return jnp.pad(x, [(0, 0), (0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 3))


def prepared(levels, gain, base, shift):
    """Bit planes, factors, base and shift, as `prepare_query` gives them."""
    minus_sum = -jnp.sum(levels, axis=-1).astype(jnp.float32)
    return tuple(map(padded, (bit_planes(levels), jnp.stack([gain, minus_sum], axis=-1), base, shift)))


def zeros(shape):
    size = mosaic_top_p.zeros(shape.batch, shape.kv_heads, padded_heads(shape.group), shape.tokens)
    return jnp.zeros((shape.batch, shape.kv_heads, size), jnp.int32)


def score_bins(shape, levels, bits, gain, scale, bias, bias_gain, shift, base, *, stop):
    """The kernel: bins, and of the state it leaves the counts and peaks of the real heads, and what it holds of all
    heads' last bins."""
    state = jax.new_ref(zeros(shape))
    bins = mosaic_score_bins.score_bins(
        *prepared(levels, gain, base, shift),
        bits,
        scale,
        bias,
        bias_gain,
        state,
        group=shape.group,
        first=FIRST,
        stop=stop,
    )
    heads = padded_heads(shape.group)
    last_bins = state[...][..., : 512 * heads].reshape(*state.shape[:2], heads, 256, 2)[..., -1, :]
    counts, peak = mosaic_bins.counts_and_peaks(state[...], heads, jnp.maximum(stop - FIRST, 0))
    return bins, counts[:, :, : shape.group], peak[:, :, : shape.group], last_bins


def select(shape, arguments, base, exact_lse, quantized, length, *, top_p):
    levels, bits, gain, scale, bias, bias_gain, shift = arguments
    return mosaic_top_p.score_and_select(
        *prepared(levels, gain, base, shift), padded(exact_lse), zeros(shape), bits, scale, bias, bias_gain, quantized,
        length, group=shape.group, sink=FIRST, top_p=top_p,
    )  # fmt: skip


def score_bins_reference(*arguments, first, stop):
    """The bins and peaks of score_bins, in plain jnp."""
    *factors, base = arguments
    z = proxy_scores_reference(*factors)
    scored = (jnp.arange(z.shape[-1]) >= first) & (jnp.arange(z.shape[-1]) < stop[:, None])
    scored = jnp.broadcast_to(scored[:, None, None], z.shape)
    bins = jnp.clip(jnp.floor(8 * (base[..., None] - z)), 0, 255).astype(jnp.uint8)
    return bins, jnp.max(jnp.where(scored, z, -jnp.inf), axis=-1)


def check_bins(shape, arguments, stop, score_bins):
    """Check bins, counts and peaks against the definition; returns them, the bins where tokens are scored."""
    z = proxy_scores_reference(*arguments)
    base = jnp.max(z, axis=-1) - 2
    words, counts, peak, last_bins = map(np.asarray, score_bins(*arguments, base))
    assert np.all(last_bins == 0), "the last bin is what is left, and not counted"
    want_bins, want_peak = score_bins_reference(*arguments, base, first=FIRST, stop=stop)
    scored = (np.arange(shape.tokens) >= FIRST) & (np.arange(shape.tokens) < np.asarray(stop)[:, None])
    scored = np.broadcast_to(scored[:, None, None], z.shape)
    bins, want = np.asarray(mosaic_bins.bytes_of(words)), np.asarray(want_bins)
    off = np.abs(bins.astype(int) - want)
    assert off[scored].max() <= 1
    # Rounding, to 1/256 of a bin and in float32, decides only next to an edge.
    depth = 8 * (np.asarray(base, np.float64)[..., None] - np.asarray(z, np.float64))
    assert np.all(np.abs(depth - np.round(depth))[scored & (off == 1)] < 0.5 / 256 + 1e-3)
    for index in np.ndindex(counts.shape[:3]):
        chosen = bins[index][scored[index]]
        np.testing.assert_array_equal(np.bincount(chosen, minlength=256), counts[index][:, 1])
        # Bins 0 and 255 take whatever lies beyond them: their places say nothing.
        places = np.bincount(chosen, depth[index][scored[index]] - chosen, minlength=256)
        atol = 1e-2 + counts[index][1:255, 1] * (0.5 / 256 + 1e-3)
        assert np.all(np.abs(places[1:255] - counts[index][1:255, 0] / 256) <= atol)
    np.testing.assert_allclose(peak, want_peak, rtol=1e-5)
    return bins[scored], counts, peak


def check_selection(shape, sharpness, offset, *, top_p=0.9, jit=lambda run: run):
    """score_and_select, with bins that begin `offset` nats above the largest score, against the definition."""
    arguments = inputs(shape, sharpness=sharpness)
    quantized, length = ranges(shape)
    z = proxy_scores_reference(*arguments)
    exact_lse = jnp.full(z.shape[:3], -jnp.inf)
    scored = (jnp.arange(shape.tokens) >= FIRST) & (jnp.arange(shape.tokens) < quantized[:, None])
    base = jnp.max(jnp.where(scored[:, None, None], z, -jnp.inf), axis=-1) + offset
    front, gain, shift = arguments[:5], arguments[5], arguments[6]
    run = jit(lambda *a: select(shape, (*a[:5], gain, a[5]), *a[6:], top_p=top_p))
    indices, counts, n_scored, mass = run(*front, shift, base, exact_lse, quantized, length)
    want = select_reference(z, exact_lse, quantized, length, sink=FIRST, top_p=top_p)
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
            assert weight[np.isin(among, chosen)].sum() >= top_p * (1 - SLACK) * weight.sum()
    assert np.all((np.asarray(mass) >= top_p) & (np.asarray(mass) <= 1))
    if offset >= 0 and top_p < 1:
        # Flat scores are few bins, of which the last is kept whole.
        assert np.asarray(n_scored).mean() <= (1.1 if sharpness >= 1 else 1.4) * np.asarray(want.scored).mean() + 2
    if top_p == 1:
        np.testing.assert_array_equal(counts, jnp.broadcast_to(length[:, None], counts.shape))


def emulate(monkeypatch):
    emulator = Emulator()
    scores = mosaic_score_bins, mosaic_scorers, mosaic_code_copies, mosaic_counters
    thresholds = mosaic_top_p_threshold, mosaic_certified_threshold
    queries = mosaic_prepare_query, mosaic_rotation, mosaic_samples, mosaic_products
    attention = mosaic_attention, mosaic_warp_attention, mosaic_found, mosaic_parts
    certificates = mosaic_certificate, mosaic_verify, mosaic_extend, mosaic_chunk, mosaic_conclusion
    selection = mosaic_bins, mosaic_compact, mosaic_rules
    for module in (*queries, *scores, *thresholds, *selection, *attention, *certificates):
        monkeypatch.setattr(module, "m", emulator)
    # An emulated block takes long.
    monkeypatch.setattr(mosaic_attention, "BLOCKS", 5)


def take_for_hopper(monkeypatch):
    """What is chosen by the device is what a Hopper GPU has."""
    for module in (selection, prepared_query):
        monkeypatch.setattr(module, "on_hopper", lambda: True)


@pytest.mark.parametrize(
    "shape,bias",
    [
        (Shape(2, 2, 4, 1024, 128), True),
        (Shape(1, 2, 5, 1024, 64), False),
        (Shape(2, 1, 3, 512, 256), False),
        (Shape(1, 1, 9, 640, 128), False),
        (Shape(2, 1, 2, 2560, 128), False),
    ],
    ids=str,
)
def test_score_bins_in_an_emulator(shape, bias, monkeypatch):
    """Every fragment and address of the kernel, with the instructions' layouts from the PTX manual; the last shape has
    blocks that are scored whole, in part, and not at all; rounds of one step, and of several; of more than four heads
    many scores lie below the bins."""
    emulate(monkeypatch)
    if shape.batch == 2:
        monkeypatch.setattr(mosaic_score_bins, "FEW_BLOCKS", 0)
    # With a bias, a centroid for each step of 32 tokens.
    centroids, sharpness = shape.tokens // 32 if bias else 4, 5.0 if shape.group > 4 else 1.0
    arguments = inputs(shape, bias=bias, centroids=centroids, sharpness=sharpness)
    stop, _ = ranges(shape)
    check_bins(shape, arguments, stop, lambda *a: score_bins(shape, *a, stop=stop))


def test_the_kernel_scores_nothing_where_codes_end_before_the_first_token(monkeypatch):
    emulate(monkeypatch)
    shape = Shape(2, 1, 2, 512, 128)
    stop = jnp.array([FIRST - 8, 0])
    _, counts, peak, _ = score_bins(shape, *inputs(shape), jnp.zeros((2, 1, 2)), stop=stop)
    assert np.all(counts == 0) and np.all(np.isneginf(peak))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_kernel_puts_a_score_that_is_no_number_into_the_best_bin(bad, monkeypatch):
    emulate(monkeypatch)
    shape = Shape(1, 1, 2, 512, 128)
    levels, bits, gain, _, *rest = inputs(shape)
    # Factors of 1 and a bit for every positive level: the score is not negative, and infinity stays positive.
    bits = jnp.broadcast_to(pack_bits(levels[:, :, :1] > 0), bits.shape)
    scale = jnp.ones((1, 1, 512), jnp.bfloat16).at[0, 0, 100].set(bad)
    words, counts, peak, _ = score_bins(
        shape, levels, bits, gain, scale, *rest, jnp.full((1, 1, 2), 1e4), stop=jnp.array([512])
    )
    assert mosaic_bins.bytes_of(words)[0, 0, 0, 100] == 0
    assert counts[0, 0, 0, 0, 1] == 1 and peak[0, 0, 0] == np.float32(3e38)


@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
@pytest.mark.parametrize("offset", [-20.0, 0.0, 8.0])
@pytest.mark.parametrize("sharpness", [0.1, 5.0])
def test_selection_in_an_emulator(sharpness, offset, top_p, monkeypatch):
    emulate(monkeypatch)
    check_selection(Shape(2, 1, 3, 512, 128), sharpness, offset, top_p=top_p)


@pytest.mark.parametrize("offset", [-30.0, -8.0, -1.0])
def test_mass_above_the_bins_is_bounded_in_an_emulator(offset, monkeypatch):
    """What is counted above base is no more than is there and, where large scores are few, most of it."""
    emulate(monkeypatch)
    shape = Shape(1, 2, 3, 1024, 128)
    arguments = inputs(shape, sharpness=5.0)
    stop = jnp.array([1000])
    z = np.asarray(proxy_scores_reference(*arguments), np.float64)[..., FIRST:1000]
    base = z.max(-1) + offset
    levels, bits, gain, *rest, shift = arguments
    state = jax.new_ref(zeros(shape))
    mosaic_score_bins.score_bins(
        *prepared(levels, gain, jnp.asarray(base, jnp.float32), shift),
        bits,
        *rest,
        state,
        group=3,
        first=FIRST,
        stop=stop,
    )
    above = np.asarray(state[...])[..., 4 * 512 : 4 * 768].reshape(1, 2, 4, 256)[:, :, :3] / 256
    counted = (above * np.exp(np.arange(256) / 8)).sum(-1)
    there = np.where(z > base[..., None], np.exp(z - base[..., None]), 0).sum(-1)
    assert np.all(counted <= there * (1 + 1e-5)) and np.all(counted >= 0.8 * there)


def bin_state(shape, counts, above, peak):
    """State that `score_bins` would leave: sums of places and counts [B,K,H,256,2], those above [B,K,H,256], peaks
    [B,K,H]."""
    bits = jax.lax.bitcast_convert_type(peak, jnp.int32)
    key = jnp.where(jnp.isneginf(peak), 0, jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))))
    # The last bin's tokens are the rest.
    flat = [x.reshape(*x.shape[:2], -1) for x in (counts.at[..., -1, :].set(0), above, key)]
    flat = jnp.concatenate(flat, axis=-1)
    return jnp.zeros_like(zeros(shape)).at[..., : flat.shape[-1]].set(flat)


def kept_bins(places, counts, above, base, peak, exact_lse, top_p):
    """How many bins surely hold the share, of one head, in float64."""
    highest = max(base, peak)
    edge, mean = np.exp(base - highest - np.arange(256) / 8), places / 256 / np.maximum(counts, 1)
    lower, upper = counts * edge * np.exp(-mean / 8), counts * edge * (1 - mean + mean * np.exp(-1 / 8))
    assert np.all(lower <= upper * (1 + 1e-12)) and np.all(upper <= lower * 1.002)
    upper[0], upper[255], lower[255] = counts[0], counts[255] * edge[255], 0
    if counts[0]:
        surely_above = np.sum(above / 256 * edge[0] * np.exp(np.arange(256) / 8))
        lower[0] = max((counts[0] - 1) * edge[0] * np.exp(-1 / 8) + np.exp(peak - highest), surely_above)
    exact = np.exp(min(exact_lse - highest, 60))
    for kept in range(257):
        held, dropped = exact + lower[:kept].sum(), upper[kept:].sum()
        if held * (1 - top_p) >= top_p * (1 + mosaic_top_p_threshold.SLACK) * dropped:
            return kept
    return 256


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(
    "shape,device_blocks",
    [
        (Shape(2, 2, 5, 10240, 128), 640),
        (Shape(2, 2, 5, 10240, 128), 6),
        (Shape(3, 1, 1, 1536, 128), 640),
        (Shape(1, 1, 1, 81920, 128), 640),
        (Shape(1, 1, 1, 81920, 128), 8),
    ],
    ids=str,
)
def test_compact_in_an_emulator(shape, device_blocks, top_p, monkeypatch):
    """One pass a block and several; several blocks, more than a warp counts at a time; every bin; rows with none and
    one scored token; exact tokens that hold nothing, much and all."""
    emulate(monkeypatch)
    monkeypatch.setattr(mosaic_compact, "BLOCKS", device_blocks)
    rng = np.random.default_rng(0)
    heads = (shape.batch, shape.kv_heads, shape.group)
    quantized = jnp.array([shape.tokens - 100, 0, 200][: shape.batch])
    length = jnp.array([shape.tokens - 37, 1, 203][: shape.batch])
    bins = np.clip(rng.normal(90, 50, (*heads, shape.tokens)), 0, 255).astype(np.uint8)
    scored = (np.arange(shape.tokens) >= FIRST) & (np.arange(shape.tokens) < quantized[:, None])
    scored = np.broadcast_to(scored[:, None, None], bins.shape)
    counts = np.zeros((*heads[:2], padded_heads(shape.group), 256, 2), np.int32)
    places = rng.integers(0, 257, bins.shape)
    for index in np.ndindex(heads):
        chosen = scored[index]
        counts[index][:, 0] = np.bincount(bins[index][chosen], places[index][chosen], minlength=256)
        counts[index][:, 1] = np.bincount(bins[index][chosen], minlength=256)
    base = rng.normal(0, 5, heads).astype(np.float32)
    peak = np.where(scored.any(-1), base + rng.normal(1, 2, heads), -np.inf).astype(np.float32)
    exact_lse = (base + rng.choice([-np.inf, -8.0, 0.0, 100.0], heads)).astype(np.float32)
    above = np.where(np.arange(256) < 8 * (peak - base)[..., None], rng.integers(0, 900, (*heads, 256)), 0)
    indices, attended, n_scored, _ = mosaic_compact.compact(
        mosaic_bins.words_of(jnp.asarray(bins)), padded(jnp.asarray(base)), padded(jnp.asarray(exact_lse)),
        jax.new_ref(bin_state(shape, jnp.asarray(counts), padded(jnp.asarray(above)), padded(jnp.asarray(peak)))),
        quantized, length,
        sink=FIRST, top_p=top_p,
    )  # fmt: skip
    held = np.arange(shape.tokens) < np.asarray(length)[:, None]
    for b, k in np.ndindex(heads[:2]):
        want = held[b] & ~scored[b, k, 0]
        for g in range(shape.group):
            at = b, k, g
            head = base[at], peak[at], exact_lse[at]
            kept = kept_bins(*counts[at].T.astype(float), above[at], *map(float, head), top_p)
            assert n_scored[at] == counts[at][:kept, 1].sum()
            want |= scored[at] & (bins[at] < kept)
        np.testing.assert_array_equal(indices[b, k, : attended[b, k]], np.flatnonzero(want))


@pytest.mark.kernel
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_selection_lowers_inside_a_loop(shape, bias, monkeypatch):
    arguments = inputs(shape, bias=bias)
    front, gain, shift = arguments[:5], arguments[5], arguments[6]
    quantized, length = ranges(shape)
    heads = jnp.zeros(shift.shape[:3])

    def run(front, shift, heads):
        def step(_, total):
            chosen = select(shape, (*front, gain, shift), heads + total, heads, quantized, length, top_p=0.9)
            return total + sum(jnp.sum(x) for x in chosen)

        return jax.lax.fori_loop(0, 2, step, 0.0)

    text = kernel_text(monkeypatch, run, front, shift, heads)
    assert "score_bins" in text and "compact" in text


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and JAX 0.11")
class TestOnHopper:
    @pytest.mark.parametrize("centroids,bias", [(1, True), (4, False), (16, True)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_bins_counts_and_peaks(self, shape, centroids, bias):
        arguments = inputs(shape, centroids=centroids, bias=bias)
        stop, _ = ranges(shape)
        gain = arguments[5]
        jitted = jax.jit(lambda *a: score_bins(shape, *a[:5], gain, *a[5:], stop=stop))
        runs = [check_bins(shape, arguments, stop, lambda *a: jitted(*a[:5], *a[6:])) for _ in range(2)]
        for first, second in zip(*runs, strict=True):
            np.testing.assert_array_equal(first, second)

    @pytest.mark.parametrize("offset", [-20.0, -3.0, 0.0, 5.0])
    @pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_selection_is_a_superset_that_holds_the_share(self, shape, sharpness, offset):
        check_selection(shape, sharpness, offset, jit=jax.jit)

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

    def test_a_large_step_is_the_same_in_every_run(self):
        """Blocks of several passes, which look back at those before; and the definition's tokens, and few others."""
        config, key = RaBitQConfig(), jax.random.key(0)
        query, cache = planted_case(make_case(Shape(4, 8, 4, 131072, 128)), config)
        assert mosaic_compact.passes_of(4 * 8, 131072) > 1
        attend = jax.jit(lambda query, cache: attention.attend_selected(query, cache, config, 128**-0.5, key))
        first, *others = [attend(query, cache) for _ in range(5)]
        held = jnp.arange(131072) < first[1].counts[..., None]
        bits = lambda run: (run[0], jnp.where(held, run[1].indices, 0), run[1].counts, run[1].mass, run[2])  # noqa: E731
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, bits(other), bits(first))
        reference = dataclasses.replace(config, scores="xla", select="xla", attend="xla")
        want = attention.attend_selected(query, cache, reference, 128**-0.5, key)[1]
        assert check_superset(first[1], want) < 0.1
