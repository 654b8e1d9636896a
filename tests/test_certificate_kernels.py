"""The kernels of debiased and certified selection against their references."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from pallas_kernels.verified_attention import normal_cdf
from rabitq_jax import attention, thresholds
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.threshold_selection import keep_by_thresholds
from rabitq_jax.verified_attention import verified_attention
from tests.kernel_cases import SHAPES, lengths

pytestmark = pytest.mark.kernel

find_bulk = jax.jit(thresholds.find_bulk, static_argnames=("deviations", "implementation"))
keep = jax.jit(keep_by_thresholds, static_argnames=("implementation",))
attend = jax.jit(verified_attention, static_argnames=("softmax_scale", "implementation"))


def noisy_case(shape, seed, dtype=jnp.float32):
    """Queries, keys and values, and estimates of their logits with errors of known deviations; ragged lengths."""
    keys = jax.random.split(jax.random.key(seed), 6)
    kv = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    query = 2 * jax.random.normal(keys[0], (*kv[:2], shape.group, shape.head_dim))
    query, key, value = (x.astype(dtype) for x in (query, *(jax.random.normal(k, kv) for k in keys[1:3])))
    true = jnp.einsum("bkgd,bktd->bkgt", *(x.astype(jnp.float32) for x in (query, key)), precision="highest")
    noise = jax.random.uniform(keys[3], query.shape[:3], minval=0.5, maxval=1.5)
    scale = jax.random.uniform(keys[4], kv[:3], minval=0.8, maxval=1.2).astype(jnp.bfloat16)
    length = lengths(shape, seed)
    quantized = length // 64 * 64 - 64
    softmax_scale = shape.head_dim**-0.5
    sd = thresholds.deviation_of(noise[..., None], scale[:, :, None])
    scores = softmax_scale * true + sd * jax.random.normal(keys[5], true.shape)
    noisy = thresholds.NoisyLogits(scores=scores, noise=noise, scale=scale, quantized=quantized, sink=5)
    mass = thresholds.measure_masses(noisy, jnp.full(query.shape[:3], 2.0))
    return query, key, value, noisy, mass, length, softmax_scale


@pytest.mark.parametrize("deviations", [0.0, 3.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_thresholds(shape, deviations):
    *_, noisy, mass, _, _ = noisy_case(shape, seed=1)
    budget, level = 0.1 * mass.total, jnp.full_like(mass.total, 1.2)
    (want, below), (got, got_below) = (
        find_bulk(noisy, mass, budget, level, deviations, implementation=name) for name in ("xla", "pallas")
    )
    # A bin whose bound meets the budget to the last digits may go either way.
    same = np.asarray(want == got)
    assert same.mean() > 0.95
    np.testing.assert_allclose(got, want, atol=thresholds.GRID + 1e-4)
    np.testing.assert_allclose(np.asarray(got_below)[same], np.asarray(below)[same], rtol=1e-4, atol=1e-7)


def test_threshold_kernel_keeps_everything_where_nothing_fits():
    *_, noisy, mass, _, _ = noisy_case(SHAPES[0].values[0], seed=2)
    none = jnp.zeros_like(mass.total)
    got, below = find_bulk(noisy, mass, none - 1, none, 0.0, implementation="pallas")
    assert np.all(got == -jnp.inf) and np.all(below == 0)


def limits_of(mass, bulk=2.0):
    """Thresholds that differ between heads; the second rule counts for some tokens."""
    bulk = bulk + jnp.linspace(-1, 1, mass.peak.size).reshape(mass.peak.shape)
    return thresholds.Thresholds(bulk=bulk, single=bulk + 1.8, deviations=2.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_lists(shape):
    *_, noisy, mass, length, _ = noisy_case(shape, seed=3)
    scores = noisy.scores.at[0, 0, 0, 70].set(jnp.nan).at[-1, -1, -1, 71].set(jnp.inf)
    noisy = dataclasses.replace(noisy, scores=scores)
    want, got = (keep(noisy, limits_of(mass), length, implementation=name) for name in ("xla", "pallas"))
    np.testing.assert_array_equal(got[1], want[1])
    for b, k in np.ndindex(got[1].shape):
        count = int(got[1][b, k])
        np.testing.assert_array_equal(got[0][b, k, :count], want[0][b, k, :count])


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-4), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_verified_attention(shape, dtype, tolerance):
    query, key, value, noisy, mass, length, softmax_scale = noisy_case(shape, seed=4, dtype=dtype)
    limits = limits_of(mass)
    indices, counts = keep(noisy, limits, length, implementation="xla")
    # A kv head that has nothing to do in a second round, where there is another one.
    counts = counts.at[-1, -1].set(0) if counts.size > 1 else counts
    lists = query, key, value, indices, counts, noisy, mass, limits
    want, got = (attend(*lists, softmax_scale=softmax_scale, implementation=name) for name in ("xla", "pallas"))
    out, attended, own, found = got
    np.testing.assert_allclose(out, want[0], atol=tolerance * float(jnp.abs(want[0]).max()), rtol=0)
    busy = np.asarray(counts > 0)
    # Products of two bfloat16 are exact in float32: logits are the same for both types.
    for name, x, y in (("attended", attended, want[1]), ("own", own, want[2])):
        np.testing.assert_allclose(np.asarray(x)[busy], np.asarray(y)[busy], rtol=1e-4, err_msg=name)
    assert np.all(np.asarray(attended)[~busy] == 0)
    for name in ("missed", "variance", "information", "score", "returned", "number"):
        x, y = (np.asarray(getattr(sums, name))[busy] for sums in (found, want[3]))
        if name in ("information", "score"):
            # A token whose tau rounding takes across 0.5 is in one sum and not in the other.
            close = np.isclose(x, y, rtol=2e-3, atol=1e-4 * np.abs(y).mean())
            assert np.mean(~close) < 0.1 and np.abs(x - y)[~close].max(initial=0) < 1, name
            continue
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4 * np.abs(y).mean(), err_msg=name)


def test_step():
    """A whole step, with and without kernels: the same tokens, output and verification."""
    base = RaBitQConfig(top_p=0.8, selection="certified", tail="mean", interval=64, sink=4)
    shape = SHAPES[1].values[0]
    query, key, value, *_ = noisy_case(shape, seed=7)
    cache = init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, base, dtype=jnp.float32)
    cache = dataclasses.replace(cache, keys=key, values=value, length=jnp.array([1000, 700]))
    cache = jax.jit(attention.build_codes, static_argnames="config")(cache, config=base)
    kernels = dataclasses.replace(base, scores="popcount", select="pallas", attend="pallas")
    plain = dataclasses.replace(base, scores="xla", select="xla", attend="xla")
    step = jax.jit(attention.attend_selected, static_argnames=("config", "softmax_scale"))
    want, got = (
        step(query, cache, config=config, softmax_scale=shape.head_dim**-0.5, prng_key=jax.random.key(0))
        for config in (plain, kernels)
    )
    np.testing.assert_array_equal(got[1].counts, want[1].counts)
    assert np.any(got[1].counts < cache.length[:, None])
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)
    for name in ("verified", "bound", "extended", "certified", "mass", "bytes_read"):
        np.testing.assert_allclose(getattr(got[2], name), getattr(want[2], name), atol=1e-4, rtol=1e-4, err_msg=name)


def test_kernels_give_the_same_bits_twice():
    query, key, value, noisy, mass, length, softmax_scale = noisy_case(SHAPES[1].values[0], seed=5)
    limits = limits_of(mass)
    runs = []
    for _ in range(2):
        bulk = find_bulk(noisy, mass, 0.1 * mass.total, 0 * mass.total, 3.0, implementation="pallas")
        kept = keep(noisy, limits, length, implementation="pallas")
        lists = query, key, value, *kept, noisy, mass, limits
        sums = attend(*lists, softmax_scale=softmax_scale, implementation="pallas")
        runs.append(jax.tree.leaves((bulk, kept[1], sums)))
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def test_normal_distribution():
    x = np.linspace(-12, 12, 2001)
    under, over = normal_cdf(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(under, norm.cdf(x), rtol=2e-5)
    np.testing.assert_allclose(over, norm.cdf(-x), rtol=2e-5)


def test_found_terms_do_not_overflow():
    """Logits far above every estimate: as in the reference, they stand for nothing that was missed."""
    query, key, value, noisy, mass, length, _ = noisy_case(SHAPES[0].values[0], seed=6)
    limits = limits_of(mass)
    kept = keep(noisy, limits, length, implementation="pallas")
    lists = query, key, value, *kept, noisy, mass, limits
    out, *_, found = attend(*lists, softmax_scale=50.0, implementation="pallas")
    assert np.all(np.isfinite(out)) and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
