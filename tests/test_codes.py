import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabitq_jax import codes, rotation
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.config import RaBitQConfig

INTERVAL = 64


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_bit_i_of_word_w_is_dimension_32w_plus_i():
    for dimension in (0, 1, 31, 32, 63, 64, 95):
        word, bit = divmod(dimension, 32)
        expected = np.zeros(3, np.uint32)
        expected[word] = 1 << bit
        np.testing.assert_array_equal(codes.pack_bits(jnp.arange(96) == dimension), expected)


def test_unpack_inverts_pack():
    positive = np.random.default_rng(0).integers(0, 2, size=(5, 3, 96)).astype(bool)
    packed = codes.pack_bits(jnp.asarray(positive))
    assert packed.shape == (5, 3, 3) and packed.dtype == jnp.uint32
    np.testing.assert_array_equal(codes.unpack_signs(packed), np.where(positive, 1.0, -1.0))


@pytest.mark.parametrize("head_dim", [20, 80, 128])
def test_encode_is_its_definition(head_dim):
    """One key at a time, in float64."""
    keys, centroid, c_q = normal(1, 9, head_dim) + 2, normal(2, 1, head_dim) + 2, normal(3, 1, head_dim)
    matrix = rotation.draw(jax.random.key(4), head_dim, "haar")
    bits, scale, bias = codes.encode_keys(jnp.asarray(keys), jnp.asarray(centroid), matrix, jnp.asarray(c_q))
    assert bias is not None and scale.dtype == bias.dtype == jnp.bfloat16
    for i, key in enumerate(keys.astype(np.float64)):
        residual = key - centroid[0]
        x = np.asarray(matrix, np.float64) @ residual
        near_zero = np.abs(x) < 1e-5
        words = np.array([int(w) >> b & 1 for w in bits[i] for b in range(32)], bool)
        assert np.all((words == (x > 0)) | near_zero)
        # bfloat16 keeps 8 bits: half a unit in the last place is 2^-9.
        np.testing.assert_allclose(float(scale[i]), x @ x / np.abs(x).sum(), rtol=2**-8)
        np.testing.assert_allclose(float(bias[i]), c_q[0] @ residual, rtol=2**-8, atol=1e-5)


def test_scale_is_the_norm_over_the_debiasing_factor():
    """RaBitQ's form (arXiv 2405.12497): <o, q> is estimated by <o_bar, q> / <o_bar, o>, with o_bar = s / sqrt(D)."""
    key, query = normal(5, 64).astype(np.float64), normal(6, 64).astype(np.float64)
    _, scale, _ = codes.encode_keys(jnp.asarray(key[None], jnp.float32), jnp.zeros((1, 64)), jnp.eye(64))
    signs = np.where(key > 0, 1.0, -1.0)
    o, o_bar = key / np.linalg.norm(key), signs / 8
    textbook = np.linalg.norm(key) * (o_bar @ query) / (o_bar @ o)
    np.testing.assert_allclose(float(scale[0]) * (signs @ query), textbook, rtol=2**-8)


def test_without_a_query_centroid_there_is_no_bias():
    assert codes.encode_keys(jnp.ones((2, 32)), jnp.zeros((1, 32)), jnp.eye(32))[2] is None


def test_key_at_its_centroid_has_scale_zero():
    _, scale, _ = codes.encode_keys(jnp.full((1, 32), 3.0), jnp.full((1, 32), 3.0), jnp.eye(32))
    assert scale[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_key_that_is_not_finite_has_scale_nan(bad):
    keys = jnp.asarray(normal(7, 2, 32)).at[0, 5].set(bad)
    _, scale, _ = codes.encode_keys(keys, jnp.zeros((1, 32)), rotation.draw(jax.random.key(0), 32, "haar"))
    assert np.isnan(float(scale[0])) and np.isfinite(float(scale[1]))


@pytest.mark.parametrize("rounding", ["random", "nearest"])
@pytest.mark.parametrize("head_dim", [20, 96])
def test_query_levels_are_within_a_step(head_dim, rounding):
    query, c_q = normal(8, 2, 3, 4, head_dim), normal(9, 2, 3, head_dim)
    matrix = rotation.draw(jax.random.key(1), head_dim, "haar")
    quantized = codes.quantize_query(
        jnp.asarray(query), matrix, jnp.asarray(c_q), rounding=rounding, key=jax.random.key(2)
    )
    rotated = (query - c_q[:, :, None]).astype(np.float64) @ np.asarray(matrix, np.float64).T
    levels, step = np.asarray(quantized.levels), np.asarray(quantized.step, np.float64)
    assert levels.dtype == np.int8 and levels.shape == rotated.shape
    np.testing.assert_allclose(step, np.abs(rotated).max(-1) / 7, rtol=1e-5)
    assert np.all(np.abs(levels).max(-1) == 7)
    error = np.abs(levels * step[..., None] - rotated) / step[..., None]
    assert error.max() < {"random": 1, "nearest": 0.5}[rounding] + 1e-4


def test_random_rounding_is_unbiased():
    """Mean over 4000 roundings; 96 independent coordinates, each within 5 standard errors (false alarm: 6e-5)."""
    runs, matrix = 4000, rotation.draw(jax.random.key(3), 96, "haar")
    query = jnp.asarray(normal(10, 1, 1, 1, 96))
    levels = jax.vmap(lambda key: codes.quantize_query(query, matrix, None, rounding="random", key=key).levels)(
        jax.random.split(jax.random.key(4), runs)
    )
    step = codes.quantize_query(query, matrix, None, rounding="nearest").step
    exact = np.asarray(query, np.float64)[0, 0, 0] @ np.asarray(matrix, np.float64).T / float(step[0, 0, 0])
    # A level is Bernoulli between two integers: its variance is f (1 - f) for the fraction f.
    fraction = exact - np.floor(exact)
    standard_error = np.sqrt(fraction * (1 - fraction) / runs)
    mean = np.asarray(levels, np.float64).mean(axis=0)[0, 0, 0]
    assert np.all(np.abs(mean - exact) <= 5 * standard_error + 1e-4)


def test_layers_round_independently():
    """Of 12,288 coordinates the roundings of two layers agree where one is sure, and in half the cases else: f^2 +
    (1 - f)^2 on average, within 5 standard errors (false alarm: 6e-7)."""
    query = jnp.asarray(normal(11, 2, 16, 4, 96))
    matrix = rotation.draw(jax.random.key(5), 96, "haar")
    one, again, other = (
        codes.quantize_query(query, matrix, None, rounding="random", key=jax.random.key(6), layer=layer).levels
        for layer in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    rotated = np.asarray(query, np.float64) @ np.asarray(matrix, np.float64).T
    fraction = 7 * rotated / np.abs(rotated).max(axis=-1, keepdims=True) % 1
    agree = fraction**2 + (1 - fraction) ** 2
    error = np.sqrt(np.mean(agree * (1 - agree)) / agree.size)
    assert abs(np.mean(np.asarray(one == other)) - agree.mean()) < 5 * error


def test_random_rounding_without_a_key_is_refused():
    with pytest.raises(ValueError, match="PRNG key"):
        codes.quantize_query(jnp.ones((1, 1, 1, 32)), jnp.eye(32), None, rounding="random")


def test_query_of_zeros_has_step_zero():
    quantized = codes.quantize_query(jnp.zeros((1, 1, 1, 32)), jnp.eye(32), None, rounding="nearest")
    assert quantized.step[0, 0, 0] == 0 and not np.any(quantized.levels)


def update(key_centroid):
    """Ragged: no block, one, two up to the end of the capacity. Returns keys, codes before and after, the blocks."""
    config = RaBitQConfig(interval=INTERVAL, key_centroid=key_centroid, query_centroid="prompt")
    old = init_layer_cache(3, 512, 2, 20, config).codes
    assert old is not None and old.bias is not None
    old = dataclasses.replace(
        old,
        bits=jnp.full_like(old.bits, 0xABCDEF01),
        scale=jnp.full_like(old.scale, -1),
        bias=jnp.full_like(old.bias, -2),
        key_centroids=jnp.asarray(normal(11, *old.key_centroids.shape), jnp.bfloat16),
        query_centroid=jnp.asarray(normal(12, 3, 2, 20)),
    )
    keys, blocks = normal(13, 3, 2, 512, 20), [range(3, 3), range(0, 1), range(6, 8)]
    first, stop = (jnp.array([getattr(block, end) for block in blocks]) for end in ("start", "stop"))
    new = codes.update_codes(
        jnp.asarray(keys), old, first, stop, interval=INTERVAL, max_blocks=3, implementation="xla"
    )  # fmt: skip
    return keys, old, new, blocks


@pytest.mark.parametrize("key_centroid", ["block", "prompt"])
def test_update_changes_only_its_blocks(key_centroid):
    _, old, new, blocks = update(key_centroid)
    for b, changed in enumerate(blocks):
        inside = np.isin(np.arange(512) // INTERVAL, changed)
        for before, after in ((old.bits, new.bits), (old.scale, new.scale), (old.bias, new.bias)):
            before, after = np.asarray(before[b]), np.asarray(after[b])
            np.testing.assert_array_equal(after[:, ~inside], before[:, ~inside])
            assert np.sum(after[:, inside] != before[:, inside]) >= 0.99 * after[:, inside].size
        kept = ~np.isin(np.arange(new.key_centroids.shape[2]), changed if key_centroid == "block" else [])
        np.testing.assert_array_equal(new.key_centroids[b][:, kept], old.key_centroids[b][:, kept])


@pytest.mark.parametrize("key_centroid", ["block", "prompt"])
def test_update_codes_against_the_centroid(key_centroid):
    keys, old, new, blocks = update(key_centroid)
    for b, block in [(b, block) for b, changed in enumerate(blocks) for block in changed]:
        tokens = slice(block * INTERVAL, (block + 1) * INTERVAL)
        centroid = np.asarray(old.key_centroids[b, :, :1], np.float64)
        if key_centroid == "block":
            centroid = keys[b, :, tokens].astype(np.float64).mean(axis=1, keepdims=True)
            stored = np.asarray(new.key_centroids[b, :, block], np.float64)
            np.testing.assert_allclose(stored, centroid[:, 0], rtol=2**-8, atol=1e-6)
        residual = keys[b, :, tokens] - centroid
        rotated = residual @ np.asarray(old.rotation, np.float64).T
        scale, bias = (np.asarray(x[b, :, tokens], np.float64) for x in (new.scale, new.bias))
        np.testing.assert_allclose(scale, (rotated**2).sum(-1) / np.abs(rotated).sum(-1), rtol=0.01)
        # The stored centroid is rounded to bfloat16.
        expected = np.einsum("ktd,kd->kt", residual, np.asarray(old.query_centroid[b], np.float64))
        np.testing.assert_allclose(bias, expected, rtol=2**-8, atol=0.02)


def test_bytes_per_token():
    sizes = dict(batch=1, capacity=512, num_kv_heads=1, head_dim=128)
    for query_centroid, expected in (("none", 18), ("prompt", 20)):
        held = init_layer_cache(**sizes, config=RaBitQConfig(query_centroid=query_centroid)).codes
        assert held is not None and held.bytes_per_token == expected
