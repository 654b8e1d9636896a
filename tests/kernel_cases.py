"""Random inputs for the kernels, the shapes they are tested at, and what a selection holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import LARGE, SMALL, Shape

SHAPES = [pytest.param(s, id=str(s)) for s in SMALL]
SHAPES += [pytest.param(s, id=str(s), marks=pytest.mark.gpu) for s in LARGE]


def lengths(shape: Shape, seed: int = 0) -> jax.Array:
    """Ragged lengths up to the capacity: one full, the others random, no two alike as a rule."""
    rng = np.random.default_rng(seed)
    values = rng.integers(shape.tokens // 3, shape.tokens, size=shape.batch)
    values[0] = shape.tokens
    return jnp.asarray(values, jnp.int32)


def score_inputs(shape: Shape, *, centroids: int, bias: bool, seed: int = 0):
    """levels, bits, gain, scale, bias, bias_gain, shift, as proxy_scores_reference takes them."""
    keys = jax.random.split(jax.random.key(seed), 6)
    words = -(-shape.head_dim // 32)
    heads, tokens = (shape.batch, shape.kv_heads, shape.group), (shape.batch, shape.kv_heads, shape.tokens)
    return (
        jax.random.randint(keys[0], (*heads, 32 * words), -7, 8, jnp.int8),
        jax.random.bits(keys[1], (*tokens, words), jnp.uint32),
        jax.random.uniform(keys[2], heads, minval=0.01, maxval=0.1),
        jax.random.uniform(keys[3], tokens, minval=0.5, maxval=2).astype(jnp.bfloat16),
        jax.random.normal(keys[4], tokens).astype(jnp.bfloat16) if bias else None,
        0.125,
        jax.random.normal(keys[5], (*heads, centroids)),
    )


def shares_of_best(logits, exact_lse):
    """Share of a head's mass in its exact tokens and its n best scored ones, for n from 0 to all, in float64."""
    logits = -np.sort(-logits.astype(np.float64))
    peak = max(logits.max(initial=-np.inf), exact_lse)
    if peak == -np.inf:
        return np.ones(1)
    held = np.exp(exact_lse - peak) + np.concatenate([[0.0], np.cumsum(np.exp(logits - peak))])
    return held / held[-1]
