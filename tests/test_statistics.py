"""What theory says of the estimate: no bias, a bound that covers what it should, and Top-p that holds p of it.

Seeds are fixed, so a test passes or fails for good; the false-alarm rates are those of a fresh seed.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import betainc

from rabitq_jax import codes as key_codes
from rabitq_jax import rotation, top_p
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.scores import proxy_scores
from tests.kernel_cases import shares_of_best


def estimate(query, keys, centroid, matrix, rounding_key):
    """Equation (1), c_q = 0: query [D], keys and centroid [n,D] -> estimated <q, k> [n], and the codes' scales [n]."""
    bits, scale, _ = key_codes.encode_keys(keys[:, None], centroid[:, None], matrix)
    quantized = key_codes.quantize_query(query[None, None, None], matrix, None, rounding="random", key=rounding_key)
    dots = key_codes.unpack_signs(bits[:, 0]) @ quantized.levels[0, 0, 0].astype(jnp.float32)
    scale = scale[:, 0].astype(jnp.float32)
    return scale * quantized.step[0, 0, 0] * dots + centroid @ query, scale


def structured_keys(query):
    """Keys [n,D] at several angles to a query, and with a large common offset, an outlier channel, or one channel."""
    rng = np.random.default_rng(1)
    across = rng.normal(size=query.size)
    across -= across @ query / (query @ query) * query
    along = query * np.linalg.norm(across) / np.linalg.norm(query)
    angles = [rho * along + (1 - rho**2) ** 0.5 * across for rho in (-0.7, 0.0, 0.1, 0.3, 0.6, 0.95)]
    outlier, single = across.copy(), np.zeros(query.size)
    outlier[3], single[5] = 40.0, 2.0
    return np.stack([*angles, across + 5, outlier, single])


@pytest.mark.parametrize("centred", [False, True])
def test_estimate_is_unbiased(centred):
    """Over rotations and rounding: nine pairs, each within 4 standard errors (false alarm: 9 times 6e-5)."""
    draws, size = 3000, 64
    query = np.random.default_rng(0).normal(size=size)
    keys = structured_keys(query)
    # A centroid may be anything that does not depend on the rotation.
    centroid = 0 * keys + (keys.mean(axis=0) if centred else 0)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=0)
    def draw(key):
        rotation_key, rounding_key = jax.random.split(key)
        matrix = rotation.draw(rotation_key, size, "haar")
        arrays = (jnp.asarray(x, jnp.float32) for x in (query, keys, centroid))
        return estimate(*arrays, matrix, rounding_key)[0]

    error = np.asarray(draw(jax.random.split(jax.random.key(2), draws)), np.float64) - keys @ query
    standard_error = error.std(axis=0) / draws**0.5
    assert np.all(np.abs(error.mean(axis=0)) < 4 * standard_error)
    # The test has power: a bias of 1 % of |q| |k - c_k| would show in every pair but the one nearly along the query.
    size_of_error = 0.01 * np.linalg.norm(query) * np.linalg.norm(keys - centroid, axis=1)
    assert np.mean(4 * standard_error < size_of_error) > 0.8


@pytest.mark.parametrize("kind", ["haar", "hadamard"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bound_covers_what_a_gaussian_would(head_dim, kind):
    """|error| <= |x| |y| sqrt((1 - a^2) / a^2) eps0 / sqrt(D - 1), for 40000 orthogonal pairs: isotropic, and so
    independent whatever the rotation.

    The error is that multiple of a coordinate uniform on a sphere, which is nearly Gaussian (1.9 covers 94 %), widened
    by up to 4 % by INT4 rounding. On top: 4 binomial standard errors (false alarm: 8 times 6e-5).
    """
    queries, keys_each = 400, 100
    rng = np.random.default_rng(3)
    query = rng.normal(size=(queries, head_dim))
    keys = rng.normal(size=(queries, keys_each, head_dim))
    keys -= np.einsum("qnd,qd->qn", keys, query)[..., None] * (query / np.sum(query**2, 1, keepdims=True))[:, None]
    matrix = rotation.draw(jax.random.key(4), head_dim, kind)
    error, scale = jax.vmap(lambda q, k, r: estimate(q, k, jnp.zeros_like(k), matrix, r))(
        jnp.asarray(query, jnp.float32), jnp.asarray(keys, jnp.float32), jax.random.split(jax.random.key(5), queries)
    )
    # scale = |x| / (sqrt(D) a)
    norm = np.linalg.norm(keys, axis=-1)
    a = norm / (head_dim**0.5 * np.asarray(scale, np.float64))
    deviation = norm * np.linalg.norm(query, axis=-1, keepdims=True) * np.sqrt((1 - a**2) / a**2 / (head_dim - 1))
    for eps0 in (1, 1.9, 3, 4):
        covered = np.mean(np.abs(error) <= eps0 * deviation)
        on_sphere, widened = (
            float(betainc(0.5, (head_dim - 2) / 2, (eps0 / s) ** 2 / (head_dim - 1))) for s in (1, 1.04)
        )
        assert abs(on_sphere - math.erf(eps0 / 2**0.5)) < 0.004
        tolerance = 4 * (widened * (1 - widened) / error.size) ** 0.5
        assert widened - tolerance <= covered <= on_sphere + tolerance


def key_distribution(kind, query, rng):
    """Keys [T,D] whose attention scores are spread, held by a few tokens, or all nearly alike."""
    keys = rng.normal(size=(1024, query.size))
    if kind == "peaked":
        keys[rng.choice(1024, 5, replace=False)] += 2 * query
    return 0.01 * keys if kind == "flat" else keys


@pytest.mark.parametrize("p", [0.5, 0.95])
@pytest.mark.parametrize("kind", ["random", "peaked", "flat"])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_kept_tokens_hold_p_of_the_estimated_mass(implementation, kind, p):
    rng = np.random.default_rng(6)
    query = 3 * rng.normal(size=(1, 2, 2, 64))
    keys = np.stack([key_distribution(kind, query[0, k, 0], rng) for k in range(2)])[None]
    codes = init_layer_cache(1, 1024, 2, 64, RaBitQConfig(interval=64)).codes
    assert codes is not None
    blocks = jnp.array([16])
    codes = key_codes.update_codes(
        jnp.asarray(keys, jnp.float32), codes, 0 * blocks, blocks, interval=64, max_blocks=16, implementation="xla"
    )
    query = jnp.asarray(query, jnp.float32)
    quantized = key_codes.quantize_query(query, codes.rotation, None, rounding="nearest")
    length = jnp.array([1024])
    scores = proxy_scores(query, quantized, codes, length, softmax_scale=0.125, implementation="xla")
    chosen = top_p.select_top_p(
        scores, jnp.full((1, 2, 2), -jnp.inf), length, length, sink=0, top_p=p, implementation=implementation
    )
    for k, g in np.ndindex(2, 2):
        logits = np.asarray(scores[0, k, g], np.float64)
        kept = chosen.indices[0, k, : chosen.counts[0, k]]
        assert np.exp(logits[kept] - logits.max()).sum() >= (p - 1e-6) * np.exp(logits - logits.max()).sum()
        own = shares_of_best(logits, -np.inf)[chosen.scored[0, k, g]]
        assert own >= p - 1e-6
        np.testing.assert_allclose(chosen.mass[0, k, g], own, atol=0.01)
