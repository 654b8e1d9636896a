"""Random numbers from a counter, for kernels and their references: threefry2x32, 20 rounds (Salmon et al., SC 2011).

The same numbers as jax.random.bits with a threefry key and `jax_threefry_partitionable`, without its dependence on that
setting.
"""

import jax
import jax.numpy as jnp

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
# A word's upper 23 bits are the number, in steps of this.
UNIFORM_SHIFT, UNIFORM_STEP = 9, 2.0**-23


def random_bits(seed, counter, stream=0):
    """uint32 of counter's shape.

    Args:
      seed: two uint32 scalars.
      counter: uint32, any shape.
      stream: uint32 scalar, the counter's high word: other numbers under the same seed.
    """
    word = lambda x: jnp.asarray(x).astype(jnp.uint32)  # noqa: E731

    def rotate(x, bits):
        return (x << bits) | jax.lax.shift_right_logical(x, jnp.full_like(x, 32 - bits))

    return scramble(
        seed, counter, word(stream), add=lambda a, b: word(a) + word(b), xor=lambda a, b: word(a) ^ word(b),
        rotate=rotate,
    )  # fmt: skip


def scramble(seed, counter, stream, *, add, xor, rotate):
    """`random_bits`, of words that are added, combined by exclusive or, and rotated to the left by these functions."""
    keys = (seed[0], seed[1], xor(xor(seed[0], seed[1]), PARITY))
    high, low = add(keys[0], stream), add(counter, keys[1])
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            high = add(high, low)
            low = xor(rotate(low, rotation), high)
        high = add(high, keys[(i + 1) % 3])
        low = add(add(low, keys[(i + 2) % 3]), i + 1)
    return xor(high, low)


def uniform(seed, counter, stream=0):
    """float32 in [0, 1), multiples of 2^-23; arguments as of `random_bits`."""
    bits = random_bits(seed, counter, stream)
    mantissa = jax.lax.shift_right_logical(bits, jnp.full_like(bits, UNIFORM_SHIFT))
    return mantissa.astype(jnp.float32) * jnp.float32(UNIFORM_STEP)
