"""Preparation of queries: its kernel against its definition, and where bins begin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import Shape
from pallas_kernels.prepare_query import HEADROOM, SAMPLES, SHARP, padded_heads, sample_positions
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.attention import build_codes, prefill
from rabitq_jax.cache import LayerCache, init_layer_cache
from rabitq_jax.codes import quantize_query
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.prepared_query import prepare_query
from rabitq_jax.scores import proxy_scores
from tests.kernel_cases import SHAPES, lengths
from tests.test_lowering import SHAPES as LOWERED
from tests.test_lowering import array, kernel_text
from tests.test_mosaic_kernels import emulate

KEY = jax.random.key(3)
CONFIG = RaBitQConfig(sink=5, recent=16, interval=64)


def filled(shape, config: RaBitQConfig, *, deviation=1.0, dtype=jnp.bfloat16) -> tuple[jax.Array, LayerCache]:
    """Queries and a ragged cache of random keys with codes."""
    keys = jax.random.split(jax.random.key(0), 3)
    cache = init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, config, dtype=dtype)
    draw = lambda key, heads: jax.random.normal(key, (shape.batch, shape.tokens, heads, shape.head_dim), dtype)  # noqa: E731
    held, heads = draw(keys[0], shape.kv_heads), shape.kv_heads * shape.group
    _, cache = prefill(
        draw(keys[1], heads), held + 0.5, held, cache, config, new_tokens=lengths(shape, seed=1), fresh=True
    )
    query = deviation * jax.random.normal(keys[2], (shape.batch, shape.kv_heads, shape.group, shape.head_dim))
    return query.astype(dtype), cache


@pytest.mark.kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_definition(shape):
    check_kernel(shape, {})


@pytest.mark.kernel
@pytest.mark.parametrize("shape", SHAPES[3:])
def test_kernel_matches_definition_with_other_choices(shape):
    check_kernel(shape, {"key_centroid": "prompt", "query_centroid": "prompt", "top_p_scope": "scored"})
    check_kernel(shape, {"query_rounding": "nearest", "rotation": "none"})


# Of query heads that are not a multiple of four or more than eight; codes of fewer words than warps, and of more; more
# centroids than a block has, and tiles of P than fit; exact tokens that take several rounds, and none; a sequence
# shorter than the sinks.
HOPPER = [
    (Shape(2, 2, 4, 1024, 128), {}),
    (Shape(1, 2, 3, 2560, 64), {"interval": 16, "query_centroid": "prompt"}),
    (Shape(2, 1, 9, 512, 256), {"sink": 460, "recent": 300, "query_rounding": "nearest"}),
    (Shape(1, 2, 2, 512, 96), {"key_centroid": "prompt", "query_centroid": "prompt", "top_p_scope": "scored"}),
]


@pytest.mark.kernel
@pytest.mark.parametrize("shape,change", HOPPER, ids=str)
def test_kernel_for_hopper_in_an_emulator(shape, change, monkeypatch):
    query, cache = filled(shape, dataclasses.replace(CONFIG, **change))
    with monkeypatch.context() as patch:
        emulate(patch)
        check_kernel(shape, change, "mosaic", jit=False)


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("shape,change", [*HOPPER, (Shape(8, 8, 4, 131072, 128), {"interval": 128})], ids=str)
def test_kernel_on_hopper(shape, change):
    check_kernel(shape, change, "mosaic")


@pytest.mark.kernel
@pytest.mark.parametrize("shape,change", HOPPER, ids=str)
def test_kernel_for_hopper_lowers(shape, change, monkeypatch):
    check_lowering(shape, change, "mosaic", monkeypatch)


@pytest.mark.kernel
@pytest.mark.parametrize("implementation", ["xla", "pallas", "mosaic"])
def test_no_level_is_more_than_four_bits_hold(implementation, monkeypatch):
    """In this layer one of the random numbers is 1 - 2^-23: added to 7, it rounds to 8."""
    config = dataclasses.replace(CONFIG, rotation="none")
    cache = init_layer_cache(1, 512, 1, 128, config)
    if implementation == "mosaic":
        emulate(monkeypatch)
    prepared = prepare_query(
        jnp.full((1, 1, 4, 128), 7, jnp.bfloat16), cache, config,
        softmax_scale=1.0, prng_key=jax.random.key(0), layer=7094, zeros=256, implementation=implementation,
    )  # fmt: skip
    np.testing.assert_array_equal(prepared.planes[0, 0, :, :3], -1)
    np.testing.assert_array_equal(prepared.planes[0, 0, :, 3], 0)


@pytest.mark.parametrize(
    "head_dim,dtype,group", [(80, jnp.bfloat16, 4), (128, jnp.float32, 4), (128, jnp.bfloat16, 17)]
)
def test_kernel_for_hopper_says_what_it_takes(head_dim, dtype, group):
    query, cache = filled(Shape(1, 1, group, 512, head_dim), CONFIG, dtype=dtype)
    with pytest.raises(NotImplementedError, match=r"the kernel takes bfloat16.*, got"):
        prepare_query(query, cache, CONFIG, softmax_scale=0.3, prng_key=KEY, zeros=512, implementation="mosaic")


def check_kernel(shape, change, implementation="pallas", *, jit=True):
    config = dataclasses.replace(CONFIG, **change)
    query, cache = filled(shape, config)
    query = query.at[-1, -1, -1].set(0)
    jitted = jax.jit(prepare_query, static_argnames=("config", "softmax_scale", "zeros", "implementation"))
    want, got = (
        prepare(query, cache, config, softmax_scale=0.3, prng_key=KEY, layer=3, zeros=512, implementation=name)
        for prepare, name in ((jitted, "xla"), (jitted if jit else prepare_query, implementation))
    )
    # A level changes where float32 rounding crosses an integer; the sum, and nothing else by more, changes with it.
    changed = np.asarray(want.planes != got.planes)
    assert changed.mean() < 2e-3
    same = ~changed.any(axis=(-1, -2))
    assert same.mean() > 0.9
    np.testing.assert_allclose(got.factors[..., 0], want.factors[..., 0], rtol=1e-5)
    np.testing.assert_array_equal(got.factors[..., 1][same], want.factors[..., 1][same])
    real = np.arange(padded_heads(shape.group)) < shape.group
    np.testing.assert_allclose(got.noise, want.noise, rtol=1e-5)
    np.testing.assert_allclose(got.base[..., real], want.base[..., real], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got.shift, want.shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.exact_lse[..., real], want.exact_lse[..., real], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(got.zeros, want.zeros)
    assert not np.any(got.planes[:, :, ~real]) and not np.any(got.factors[:, :, ~real])


@pytest.mark.kernel
@pytest.mark.parametrize("shape", LOWERED, ids=str)
def test_kernel_lowers(shape, monkeypatch):
    for change in ({}, {"key_centroid": "prompt", "query_centroid": "prompt"}):
        check_lowering(shape, change, "pallas", monkeypatch)


def check_lowering(shape, change, implementation, monkeypatch):
    query = array(shape.batch, shape.kv_heads, shape.group, shape.head_dim, dtype=jnp.bfloat16)
    sizes = (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
    config = dataclasses.replace(CONFIG, **change)
    cache = jax.eval_shape(lambda: init_layer_cache(*sizes, config))
    run = lambda query, cache: prepare_query(  # noqa: E731
        query, cache, config, softmax_scale=0.3, prng_key=KEY, zeros=512, implementation=implementation
    )
    assert "prepare_query" in kernel_text(monkeypatch, run, query, cache)


@pytest.mark.parametrize("quantized,sink", [(0, 16), (16, 16), (100, 16), (128, 0), (8192, 5), (10**7, 16)])
def test_samples_are_spread_over_the_scored_tokens(quantized, sink):
    position = np.asarray(sample_positions(jnp.array([quantized]), sink, 2**24))
    if quantized - sink < SAMPLES:
        assert position.min() == sink and position.max() <= max(quantized - 1, sink)
        return
    assert position.min() == sink and position.max() < quantized
    np.testing.assert_allclose(np.diff(position), (quantized - sink) / SAMPLES, atol=1)


@pytest.mark.parametrize("deviation", [0.5, 20.0])
def test_bins_begin_near_the_largest_score(deviation):
    """The guess from a sample is within a few deviations of the largest of normal scores, in each of 32 heads."""
    batch, kv_heads, tokens = 2, 4, 8192
    keys = jax.random.split(jax.random.key(0), 3)
    config = RaBitQConfig(query_rounding="nearest")
    cache = init_layer_cache(batch, tokens, kv_heads, 128, config)
    held, length = jax.random.normal(keys[0], cache.keys.shape, jnp.bfloat16), jnp.array([tokens, 1100])
    cache = build_codes(dataclasses.replace(cache, keys=held, length=length), config)
    assert cache.codes is not None
    query = deviation * jax.random.normal(keys[1], (batch, kv_heads, 4, 128))
    scale = 128**-0.5
    prepared = prepare_query(query, cache, config, softmax_scale=scale, prng_key=None, zeros=256)
    levels = quantize_query(query, cache.codes.rotation, None, rounding="nearest")
    z = proxy_scores(query, levels, cache.codes, cache.quantized, softmax_scale=scale)
    scored = (jnp.arange(tokens) >= config.sink) & (jnp.arange(tokens) < cache.quantized[:, None])
    largest = jnp.max(jnp.where(scored[:, None, None], z, -jnp.inf), axis=-1)
    headroom = HEADROOM if deviation < SHARP else 0
    assert np.all(np.abs(prepared.base - headroom - largest) < 2.5 * deviation)
