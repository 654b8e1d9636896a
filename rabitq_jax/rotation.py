"""Random orthogonal rotations P, drawn from a PRNG key and stored as matrices.

The codes of a head of D dimensions have `code_dim` >= D bits: P is [code_dim, D], the first D columns of an orthogonal
matrix, so that P x is the rotation of x padded with zeros, <P x, P y> = <x, y>, and every bit carries information.
"""

import jax
import jax.numpy as jnp

from rabitq_jax.config import RotationKind

HADAMARD_ROUNDS = 3


def code_dim(head_dim: int, kind: RotationKind) -> int:
    """Number of bits of a key's code: `head_dim` rounded up to 32, 64 or a multiple of 128, which the binary tensor
    core takes, or to a power of two for "hadamard". Bits that are added make estimates better."""
    words = -(-head_dim // 32)
    if kind == "hadamard":
        words = 1 << (words - 1).bit_length()
    elif words > 2:
        words = -(-words // 4) * 4
    return 32 * words


def draw(key: jax.Array, head_dim: int, kind: RotationKind) -> jax.Array:
    """Draw P, float32 [code_dim, head_dim], with orthonormal columns.

    "haar" is uniform over the orthogonal matrices: QR of a Gaussian matrix with the signs of R's diagonal moved to Q
    (Mezzadri, arXiv math-ph/0609050). "hadamard" is three rounds of random signs and a Walsh-Hadamard transform, which
    costs O(D log D) to build; one round is not enough where a vector is concentrated in few dimensions. "none" is the
    identity, whatever the key.
    """
    size = code_dim(head_dim, kind)
    if kind == "none":
        return jnp.eye(size, head_dim, dtype=jnp.float32)
    if kind == "haar":
        q, r = jnp.linalg.qr(jax.random.normal(key, (size, size), jnp.float32))
        return (q * jnp.sign(jnp.diagonal(r)))[:, :head_dim]
    signs = jax.random.rademacher(key, (HADAMARD_ROUNDS, size), jnp.float32)
    columns = jnp.eye(head_dim, size, dtype=jnp.float32)
    for sign in signs:
        columns = walsh_hadamard(columns * sign)
    return columns.T


def walsh_hadamard(x: jax.Array) -> jax.Array:
    """Orthonormal Walsh-Hadamard transform of the last axis, whose size is a power of two."""
    size = x.shape[-1]
    half = 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return x / jnp.sqrt(jnp.float32(size))
