"""Score kernels against the reference: exact integers, then equal floats."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabitq_jax import scores
from rabitq_jax.codes import unpack_signs
from tests.kernel_cases import SHAPES, lengths, score_inputs

pytestmark = pytest.mark.kernel

triton_present = importlib.util.find_spec("jax_triton") is not None
IMPLEMENTATIONS = [
    "popcount",
    "int4",
    pytest.param(
        "triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not triton_present, reason="jax-triton is not installed")]
    ),
]


@functools.partial(jax.jit, static_argnames=("implementation", "bias_gain"))
def run(levels, bits, gain, scale, bias, bias_gain, shift, length, *, implementation):
    return scores.IMPLEMENTATIONS[implementation](levels, bits, gain, scale, bias, bias_gain, shift, length=length)


def valid(got, length):
    """Scores with those past each sequence's length set to 0."""
    held = jnp.arange(got.shape[-1]) < length[:, None]
    return np.asarray(jnp.where(held[:, None, None], got, 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_equal_the_reference_bit_for_bit(shape, implementation):
    levels, bits, gain, scale, _, bias_gain, shift = score_inputs(shape, centroids=4, bias=False)
    levels = levels.at[0, 0, 0].set(-7).at[..., -1, :].set(7)
    bits = bits.at[:, :, :7].set(0xFFFFFFFF).at[:, :, 7:9].set(0)
    # Factors of one leave 2 <u, bits> - sum(u).
    inputs = (levels, bits, jnp.ones_like(gain), jnp.ones_like(scale), None, bias_gain, jnp.zeros_like(shift))
    length = lengths(shape)
    want = jnp.einsum("bkgd,bktd->bkgt", levels.astype(jnp.float32), unpack_signs(bits), precision="highest")
    got = run(*inputs, length, implementation=implementation)
    np.testing.assert_array_equal(valid(got, length), valid(want, length))


@pytest.mark.parametrize("centroids,bias", [(1, True), (4, False)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_the_reference(shape, implementation, centroids, bias):
    inputs = score_inputs(shape, centroids=centroids, bias=bias, seed=1)
    length = lengths(shape, seed=1)
    want = scores.proxy_scores_reference(*inputs)
    got = run(*inputs, length, implementation=implementation)
    # Same operations on the same float32 numbers; a compiler may fuse a multiplication and an addition.
    np.testing.assert_allclose(valid(got, length), valid(want, length), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", ["popcount", "int4"])
def test_refuses_a_capacity_it_cannot_split(implementation):
    levels, bits, gain, scale, bias, bias_gain, shift = score_inputs(SHAPES[0].values[0], centroids=1, bias=True)
    with pytest.raises(NotImplementedError, match="multiples of 16"):
        scores.IMPLEMENTATIONS[implementation](
            levels, bits[:, :, :100], gain, scale[:, :, :100], bias[:, :, :100], bias_gain, shift, length=jnp.array([9])
        )
