import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabitq_jax import rotation

KINDS = ["haar", "hadamard"]
HEAD_DIMS = [20, 32, 64, 80, 96, 128]


def draw(seed, head_dim, kind):
    return np.asarray(rotation.draw(jax.random.key(seed), head_dim, kind), np.float64)


@pytest.mark.parametrize(
    "head_dim,haar,hadamard",
    [(1, 32, 32), (32, 32, 32), (33, 64, 64), (80, 128, 128), (128, 128, 128), (192, 256, 256), (320, 384, 512)],
)
def test_code_has_whole_words(head_dim, haar, hadamard):
    assert rotation.code_dim(head_dim, "haar") == haar
    assert rotation.code_dim(head_dim, "hadamard") == hadamard


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_columns_are_orthonormal(head_dim, kind):
    matrix = draw(0, head_dim, kind)
    assert matrix.shape == (rotation.code_dim(head_dim, kind), head_dim)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(head_dim), atol=2e-6)


def test_none_is_the_identity():
    np.testing.assert_array_equal(draw(0, 20, "none"), np.eye(32, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_padded_dimensions_get_their_share(kind):
    """Every bit carries information: no row of P is (nearly) zero, as it would be if the code alone were padded."""
    energy = np.sum(draw(1, 20, kind) ** 2, axis=1)
    assert energy.min() > 0.1 * 20 / 32


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_determines_the_matrix(kind):
    np.testing.assert_array_equal(draw(3, 80, kind), draw(3, 80, kind))
    assert np.abs(draw(3, 80, kind) - draw(4, 80, kind)).max() > 0.1


def test_haar_diagonal_has_no_sign():
    """An entry of a Haar matrix of size n has mean 0 and variance 1/n. Without the sign fix the mean of the diagonal is
    -0.11 here, 49 standard errors away."""
    size, draws = 32, 200
    keys = jax.random.split(jax.random.key(5), draws)
    matrices = jax.vmap(functools.partial(rotation.draw, head_dim=size, kind="haar"))(keys)
    diagonal = np.asarray(jnp.diagonal(matrices, axis1=1, axis2=2), np.float64)
    standard_error = (1 / size / diagonal.size) ** 0.5
    assert abs(diagonal.mean()) < 4 * standard_error
    # Entries of one column are uniform on the sphere: fourth moment 3 / (n (n + 2)), here within 5 %.
    fourth = np.mean(np.asarray(matrices, np.float64) ** 4)
    np.testing.assert_allclose(fourth, 3 / (size * (size + 2)), rtol=0.05)


def test_walsh_hadamard_is_the_matrix_of_parities():
    size = 64
    index = np.arange(size)
    parity = np.bitwise_count(index[:, None] & index) % 2
    x = np.random.default_rng(6).normal(size=(3, size))
    got = rotation.walsh_hadamard(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, x @ (1 - 2.0 * parity) / size**0.5, atol=1e-5)


def test_hadamard_spreads_a_vector_of_one_dimension():
    """One round would give every coordinate the same magnitude, and the code of a unit vector would be exact."""
    column = np.abs(draw(7, 128, "hadamard")[:, 0])
    assert column.std() > 0.4 * column.mean()
    assert column.max() < 6 / 128**0.5
