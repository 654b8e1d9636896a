import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import Shape
from rabitq_jax import codes as key_codes
from rabitq_jax import scores
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.config import RaBitQConfig
from tests.kernel_cases import score_inputs

SHAPE = Shape(2, 2, 3, 512, 80)


def quantized_cache(query_centroid, key_centroid="block", seed=0):
    """Codes of random keys, with queries [B,K,G,D] and their INT4 form."""
    config = RaBitQConfig(interval=64, query_centroid=query_centroid, key_centroid=key_centroid)
    rng = np.random.default_rng(seed)
    keys = jnp.asarray(rng.normal(size=(2, 2, 512, 80)) + 1, jnp.float32)
    codes = init_layer_cache(2, 512, 2, 80, config).codes
    assert codes is not None
    if codes.query_centroid is not None:
        centroid = jnp.asarray(rng.normal(size=codes.query_centroid.shape), jnp.float32)
        codes = dataclasses.replace(codes, query_centroid=centroid)
    blocks = jnp.full((2,), 8)
    codes = key_codes.update_codes(keys, codes, 0 * blocks, blocks, interval=64, max_blocks=8, implementation="xla")
    query = jnp.asarray(rng.normal(size=(2, 2, 3, 80)), jnp.float32)
    quantized = key_codes.quantize_query(query, codes.rotation, codes.query_centroid, rounding="nearest")
    return keys, codes, query, quantized


@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_equation_1(bias):
    """One number at a time, in float64."""
    inputs = score_inputs(SHAPE, centroids=4, bias=bias)
    got = np.asarray(scores.proxy_scores_reference(*inputs))
    levels, bits, gain, scale, stored_bias, bias_gain, shift = (
        x if x is None or isinstance(x, float) else np.asarray(x) for x in inputs
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        b, k, g, t = (rng.integers(n) for n in (2, 2, 3, 512))
        ones = [int(word) >> bit & 1 for word in bits[b, k, t] for bit in range(32)]
        u = levels[b, k, g].astype(int)
        expected = float(gain[b, k, g]) * float(scale[b, k, t]) * (2 * np.dot(u, ones) - u.sum())
        expected += float(shift[b, k, g, t // 128])
        if bias:
            expected += bias_gain * float(stored_bias[b, k, t])
        np.testing.assert_allclose(got[b, k, g, t], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("key_centroid", ["block", "prompt"])
@pytest.mark.parametrize("query_centroid", ["none", "prompt"])
def test_scores_estimate_the_logits(query_centroid, key_centroid):
    """The error is noise of the predicted size, about 0.76 |q - c_q| |k - c_k| / sqrt(D) before the softmax scale, and
    not the size of a term of equation (1) that is missing: <c_q, k> and <q, c_k> have deviations like the logits'."""
    keys, codes, query, quantized = quantized_cache(query_centroid, key_centroid)
    got = scores.proxy_scores(query, quantized, codes, jnp.full((2,), 512), softmax_scale=0.25, implementation="xla")
    query, keys = np.asarray(query, np.float64), np.asarray(keys, np.float64)
    error = np.asarray(got) - 0.25 * np.einsum("bkgd,bktd->bkgt", query, keys)
    centred = query - (0 if codes.query_centroid is None else np.asarray(codes.query_centroid)[:, :, None])
    centroid = np.repeat(np.asarray(codes.key_centroids, np.float64), codes.tokens_per_centroid, axis=2)
    norms = np.linalg.norm(centred, axis=-1)[..., None] * np.linalg.norm(keys - centroid, axis=-1)[:, :, None]
    relative = error / (0.25 * 0.76 * norms / codes.rotation.shape[0] ** 0.5)
    assert 0.8 < np.sqrt(np.mean(relative**2)) < 1.2
    assert abs(relative.mean()) < 0.2


def test_dispatch_and_refusals():
    _, codes, query, quantized = quantized_cache("none")
    length = jnp.full((2,), 512)
    with pytest.raises(ValueError, match="implementation must be one of .*got 'cuda'"):
        scores.proxy_scores(query, quantized, codes, length, softmax_scale=1.0, implementation="cuda")
    short = dataclasses.replace(quantized, levels=quantized.levels[..., :64])
    with pytest.raises(ValueError, match="64 dimensions, codes 128 bits"):
        scores.proxy_scores(query, short, codes, length, softmax_scale=1.0)
