"""Selection, gathered attention and block quantization kernels against their references."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import LARGE, SMALL
from pallas_kernels import gathered_attention as kernel
from pallas_kernels import quantize_keys
from rabitq_jax import codes as key_codes
from rabitq_jax import exact_logsumexp, gathered_attention, token_list, top_p
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.config import RaBitQConfig
from tests.kernel_cases import SHAPES, lengths, shares_of_best

pytestmark = pytest.mark.kernel


def random_scores(shape, sigma, seed):
    key = jax.random.key(seed)
    return sigma * jax.random.normal(key, (shape.batch, shape.kv_heads, shape.group, shape.tokens))


# One compiled program for every distribution of scores at a shape.
select_top_p = jax.jit(top_p.select_top_p, static_argnames=("sink", "top_p", "implementation"))


def select(implementation, scores, exact_lse, quantized, length, sink, p):
    chosen = select_top_p(scores, exact_lse, quantized, length, sink=sink, top_p=p, implementation=implementation)
    return jax.tree.map(np.asarray, chosen)


def sets(selection):
    """The lists as sets, after checking that they ascend and have no repeats."""
    lists = [selection.indices[b, k, : selection.counts[b, k]] for b, k in np.ndindex(selection.counts.shape)]
    for entries in lists:
        assert np.all(np.diff(entries) > 0)
    return [set(entries.tolist()) for entries in lists]


def raise_odds(p, nats):
    """The share whose odds p / (1 - p) are exp(nats) times those of p."""
    return p * np.exp(nats) / (1 - p + p * np.exp(nats))


@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("scope", ["all", "scored"])
@pytest.mark.parametrize("shape", SHAPES)
def test_selection_holds_the_mass_and_little_more(shape, scope, sigma):
    p, sink, bin_width = 0.9, 5, 1 / 32
    scores = random_scores(shape, sigma, seed=2)
    length = lengths(shape, seed=2)
    quantized = length // 128 * 128 - 128
    exact_lse = jnp.full(scores.shape[:3], -jnp.inf if scope == "scored" else sigma * 2)
    reference = select("xla", scores, exact_lse, quantized, length, sink, p)
    kernel = select("pallas", scores, exact_lse, quantized, length, sink, p)
    for minimal, chosen in zip(sets(reference), sets(kernel), strict=True):
        assert minimal <= chosen

    # The kernel stops at the first bin after which the kept bins' lower edges hold p against the dropped bins' upper
    # edges. One bin earlier they do not; each edge is off by at most exp(bin_width), so the share kept there is below
    # the one that has exp(2 bin_width) times the odds of p (1.0001: the kernel's slack, and float32 sums). At that
    # higher share the definition keeps the last bin's best token, and the rest of the bin is within one bin_width.
    # (What lies more than 32 nats below the best score has one bin, and no weight.)
    higher_p = raise_odds(1.0001 * p, 2 * bin_width)
    scores, exact_lse = np.asarray(scores), np.asarray(exact_lse)
    for (b, k), chosen in zip(np.ndindex(kernel.counts.shape), sets(kernel), strict=True):
        is_scored = np.zeros(shape.tokens, bool)
        is_scored[sink : quantized[b]] = True
        attended = ~is_scored & (np.arange(shape.tokens) < length[b])
        for g in range(shape.group):
            logits = scores[b, k, g, is_scored]
            share = shares_of_best(logits, exact_lse[b, k, g])
            best, kept = -np.sort(-logits), kernel.scored[b, k, g]
            assert share[kept] >= p
            assert share[reference.scored[b, k, g]] >= p - 1e-5
            at_higher_p = np.searchsorted(share, higher_p)
            assert kept <= (0 if at_higher_p == 0 else np.sum(best >= best[at_higher_p - 1] - bin_width - 1e-4))
            # A bin counts with its middle: off by at most exp(bin_width) between what is kept and what is dropped.
            assert raise_odds(share[kept], -bin_width) - 1e-5 <= kernel.mass[b, k, g]
            assert raise_odds(share[kept], bin_width) + 1e-5 >= kernel.mass[b, k, g]
            if kept:
                attended |= is_scored & (scores[b, k, g] >= best[kept - 1])
        assert chosen == set(np.flatnonzero(attended).tolist())


@pytest.mark.parametrize("shape", SHAPES)
def test_selection_at_p_one_keeps_everything(shape):
    scores = random_scores(shape, 20.0, seed=3)
    length = lengths(shape, seed=3)
    quantized = length // 64 * 64 - 64
    lse = jnp.full(scores.shape[:3], 3.0)
    for implementation in ("xla", "pallas"):
        chosen = select(implementation, scores, lse, quantized, length, 4, 1.0)
        np.testing.assert_array_equal(chosen.counts, np.broadcast_to(length[:, None], chosen.counts.shape))
        for b, k in np.ndindex(chosen.counts.shape):
            np.testing.assert_array_equal(chosen.indices[b, k, : length[b]], np.arange(length[b]))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_selection_of_extremes(implementation):
    shape = SHAPES[1].values[0]
    scores = random_scores(shape, 1.0, seed=4)
    scores = scores.at[0, 0, 0, 300].set(80.0)
    length, quantized = jnp.array([1000, 40]), jnp.array([896, 0])
    chosen = select(implementation, scores, jnp.full(scores.shape[:3], -jnp.inf), quantized, length, 8, 1e-6)
    # One needle holds any share; near-zero p keeps one token a head; the second sequence has nothing scored.
    assert chosen.scored[0, 0, 0] == 1 and 300 in sets(chosen)[0]
    assert np.all(chosen.scored[0] >= 1)
    assert sets(chosen)[2] == set(range(40)) and np.all(chosen.scored[1] == 0)
    assert set(range(8)) | set(range(896, 1000)) <= sets(chosen)[0]
    # Exact tokens that already hold p leave nothing to keep.
    chosen = select(implementation, scores, jnp.full(scores.shape[:3], 200.0), quantized, length, 8, 0.9)
    assert np.all(chosen.scored == 0)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_selection_keeps_a_score_that_is_not_finite(implementation, bad):
    shape = SHAPES[1].values[0]
    scores = random_scores(shape, 3.0, seed=5).at[1, 1, 2, 77].set(bad)
    length = jnp.array([1024, 1024])
    quantized = length - 128
    chosen = select(implementation, scores, jnp.zeros(scores.shape[:3]), quantized, length, 0, 0.5)
    assert 77 in sets(chosen)[3]


@pytest.mark.parametrize("share", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_of_a_mask(shape, share):
    rng = np.random.default_rng(5)
    mask = rng.random((shape.batch, shape.kv_heads, shape.tokens)) < share
    length = np.asarray(lengths(shape))
    indices, counts = token_list.list_tokens(jnp.asarray(mask), jnp.asarray(length), implementation="pallas")
    for b, k in np.ndindex(mask.shape[:2]):
        expected = np.flatnonzero(mask[b, k, : length[b]])
        assert counts[b, k] == len(expected)
        np.testing.assert_array_equal(indices[b, k, : len(expected)], expected)


def test_a_mask_that_does_not_fill_its_words_is_refused():
    mask, length = jnp.ones((1, 1, 48), bool), jnp.array([48])
    assert token_list.list_tokens(mask, length, implementation="xla")[1] == 48
    with pytest.raises(NotImplementedError, match="multiples of 32 tokens, got 48"):
        token_list.list_tokens(mask, length, implementation="pallas")


def test_selection_kernel_gives_the_same_bits_twice():
    shape = SHAPES[1].values[0]
    scores = random_scores(shape, 3.0, seed=6)
    length = jnp.array([1024, 700])
    runs = [select("pallas", scores, jnp.zeros(scores.shape[:3]), length - 128, length, 8, 0.9) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].counts, runs[1].counts)
    assert sets(runs[0]) == sets(runs[1])
    np.testing.assert_array_equal(runs[0].mass, runs[1].mass)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_attention(shape, dtype, tolerance):
    keys = jax.random.split(jax.random.key(7), 4)
    kv = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    query = jax.random.normal(keys[0], (*kv[:2], shape.group, shape.head_dim), jnp.float32).astype(dtype)
    key, value = (jax.random.normal(k, kv, jnp.float32).astype(dtype) for k in keys[1:3])
    rng = np.random.default_rng(7)
    rows = shape.batch * shape.kv_heads
    counts = rng.integers(0, shape.tokens // 4, size=rows)
    counts[:3] = (shape.tokens, 0, 17)[: len(counts[:3])]
    indices = np.stack([rng.permutation(shape.tokens) for _ in range(rows)])
    indices = np.where(np.arange(shape.tokens) < counts[:, None], indices, 2**30)
    indices = jnp.asarray(indices.reshape(kv[:3]), jnp.int32)
    counts = jnp.asarray(counts.reshape(kv[:2]), jnp.int32)
    want = gathered_attention.gathered_attention(
        query.astype(jnp.float32), key.astype(jnp.float32), value.astype(jnp.float32), indices, counts,
        softmax_scale=shape.head_dim**-0.5, implementation="xla",
    )  # fmt: skip
    got = gathered_attention.gathered_attention(
        query, key, value, indices, counts, softmax_scale=shape.head_dim**-0.5, implementation="pallas"
    )
    assert np.all(np.asarray(got)[np.asarray(counts) == 0] == 0)
    np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()), rtol=0)


UNEVEN = (0, 512, 0, 0, 3, 64, 65, 200)


@pytest.mark.parametrize(
    "counts,programs",
    [(UNEVEN, 1), (UNEVEN, 7), (UNEVEN, 40), ((0,) * 8, 7), ((0, 0, 0, 1, 0, 0, 0, 0), 7), ((512,) * 8, 40)],
)
def test_gathered_attention_is_split_evenly_over_uneven_lists(counts, programs, monkeypatch):
    """Programs that go through many lists, that share one, and that have nothing to do."""
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    monkeypatch.setattr(kernel, "COMBINED_PARTS", 4)
    keys = jax.random.split(jax.random.key(9), 3)
    query, key, value = (jax.random.normal(k, (4, 2, n, 16)) for k, n in zip(keys, (3, 512, 512), strict=True))
    indices = jnp.asarray([np.random.default_rng(i).permutation(512) for i in range(8)], jnp.int32).reshape(4, 2, 512)
    arguments = query, key, value, indices, jnp.asarray(counts, jnp.int32).reshape(4, 2)
    want, got = (
        gathered_attention.gathered_attention(*arguments, softmax_scale=0.25, implementation=implementation)
        for implementation in ("xla", "pallas")
    )
    np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()), rtol=0)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_gathered_attention_equals_softmax_over_the_list(implementation):
    """Against a few lines of float64 NumPy that share no code with the reference."""
    rng = np.random.default_rng(8)
    query, keys, values = (rng.normal(size=(1, 2, n, 32)) for n in (3, 512, 512))
    indices = np.stack([rng.permutation(512) for _ in range(2)])[None]
    counts = np.array([[300, 31]])
    got = gathered_attention.gathered_attention(
        *(jnp.asarray(x, jnp.float32) for x in (query, keys, values)), jnp.asarray(indices, jnp.int32),
        jnp.asarray(counts, jnp.int32), softmax_scale=0.3, implementation=implementation,
    )  # fmt: skip
    for k in range(2):
        chosen = indices[0, k, : counts[0, k]]
        for g in range(3):
            weights = np.exp(0.3 * keys[0, k, chosen] @ query[0, k, g])
            np.testing.assert_allclose(got[0, k, g], weights @ values[0, k, chosen] / weights.sum(), atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gathered_attention_shows_a_key_that_is_not_finite(implementation, bad):
    ones = jnp.ones((1, 1, 512, 32))
    keys = ones.at[0, 0, 100, 3].set(bad)
    lists = jnp.arange(512, dtype=jnp.int32)[None, None]

    def attend(n):
        count = jnp.array([[n]], jnp.int32)
        return gathered_attention.gathered_attention(
            ones[:, :, :2], keys, ones, lists, count, softmax_scale=1.0, implementation=implementation
        )

    assert np.all(np.isnan(attend(101))) and np.all(np.isfinite(attend(100)))


@pytest.mark.parametrize("key_centroid,query_centroid", [("block", "none"), ("prompt", "prompt")])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_keys(shape, key_centroid, query_centroid):
    check_quantize_keys(shape, RaBitQConfig(key_centroid=key_centroid, query_centroid=query_centroid, interval=64))


@pytest.mark.parametrize(
    "shape,largest", [(SMALL[1], 2048), pytest.param(LARGE[3], None, marks=pytest.mark.gpu)], ids=str
)
def test_quantize_keys_in_parts(shape, largest, monkeypatch):
    """A block of more numbers than are multiplied at a time."""
    if largest is not None:
        monkeypatch.setattr(quantize_keys, "LARGEST_PRODUCT", largest)
    config = RaBitQConfig(query_centroid="prompt", interval=128)
    assert config.interval * shape.head_dim > quantize_keys.LARGEST_PRODUCT
    check_quantize_keys(shape, config)


def check_quantize_keys(shape, config):
    interval = config.interval
    keys = jax.random.split(jax.random.key(9), 4)
    held = jax.random.normal(keys[0], (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)) + 1
    codes = init_layer_cache(*held.shape[:1], shape.tokens, shape.kv_heads, shape.head_dim, config).codes
    assert codes is not None
    noise = jax.random.bits(keys[1], codes.bits.shape, jnp.uint32)
    centroids = jax.random.normal(keys[2], codes.key_centroids.shape).astype(jnp.bfloat16)
    codes = dataclasses.replace(codes, bits=noise, key_centroids=centroids)
    if codes.query_centroid is not None:
        codes = dataclasses.replace(codes, query_centroid=jax.random.normal(keys[3], codes.query_centroid.shape))
    first = jnp.arange(shape.batch, dtype=jnp.int32) + 1
    stop = first + jnp.arange(shape.batch, dtype=jnp.int32) % 3 + 1
    new = {
        name: jax.jit(key_codes.update_codes, static_argnames=("interval", "max_blocks", "implementation"))(
            held, codes, first, stop, interval=interval, max_blocks=4, implementation=name
        )
        for name in ("xla", "pallas")
    }
    xla, pallas = new["xla"], new["pallas"]
    # A sum in another order may round a bfloat16 centroid the other way; codes are compared for equal centroids.
    np.testing.assert_allclose(
        xla.key_centroids.astype(jnp.float32), pallas.key_centroids.astype(jnp.float32), rtol=2**-7, atol=1e-3
    )
    changed = np.zeros((shape.batch, shape.tokens), bool)
    for b in range(shape.batch):
        changed[b, interval * int(first[b]) : interval * int(stop[b])] = True
    same_centroid = np.repeat(
        np.all(np.asarray(xla.key_centroids == pallas.key_centroids), axis=-1),
        codes.tokens_per_centroid, axis=-1,
    )  # fmt: skip
    assert same_centroid.mean() > 0.5
    differ = np.bitwise_count(np.asarray(xla.bits ^ pallas.bits)).sum(-1)
    # A coordinate within rounding of zero may fall on either side.
    assert differ[same_centroid].sum() <= 1e-5 * same_centroid.sum() * shape.head_dim + 2
    np.testing.assert_array_equal(np.asarray(pallas.bits)[~np.broadcast_to(changed[:, None], differ.shape)],
                                  np.asarray(noise)[~np.broadcast_to(changed[:, None], differ.shape)])  # fmt: skip
    assert np.all(differ[:, :, :interval] == 0)
    np.testing.assert_allclose(xla.scale.astype(jnp.float32), pallas.scale.astype(jnp.float32), rtol=2**-6, atol=1e-3)
    if xla.bias is not None:
        assert pallas.bias is not None
        np.testing.assert_allclose(
            np.asarray(xla.bias, np.float32)[same_centroid], np.asarray(pallas.bias, np.float32)[same_centroid],
            rtol=2**-6, atol=0.05,
        )  # fmt: skip


def test_quantize_keys_refuses_an_interval_it_cannot_block():
    config = RaBitQConfig(interval=100)
    cache = init_layer_cache(1, 12800, 1, 32, config)
    zero = jnp.zeros((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="powers of two"):
        assert cache.codes is not None
        key_codes.update_codes(cache.keys, cache.codes, zero, zero, interval=100, max_blocks=1, implementation="pallas")


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_logsumexp(shape, dtype, tolerance):
    keys = jax.random.split(jax.random.key(10), 2)
    query = jax.random.normal(keys[0], (shape.batch, shape.kv_heads, shape.group, shape.head_dim)).astype(dtype)
    held = jax.random.normal(keys[1], (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)).astype(dtype)
    length = lengths(shape, seed=10).at[-1].set(7)
    quantized = jnp.maximum(length // 64 * 64 - 64, 0)
    for sink in (0, 20):
        got, want = (
            exact_logsumexp.exact_logsumexp(
                query, held, quantized, length, sink=sink, window=128, softmax_scale=0.2, implementation=name
            )
            for name in ("pallas", "xla")
        )
        np.testing.assert_allclose(got, want, atol=tolerance)
