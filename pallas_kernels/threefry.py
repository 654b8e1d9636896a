"""Random numbers from a counter, for kernels and their references: threefry2x32, 20 rounds (Salmon et al., SC 2011).

The same numbers as jax.random.bits with a threefry key and `jax_threefry_partitionable`, without its dependence on that
setting.
"""

import jax
import jax.numpy as jnp

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def random_bits(seed, counter, stream=0):
    """uint32 of counter's shape.

    Args:
      seed: two uint32 scalars.
      counter: uint32, any shape.
      stream: uint32 scalar, the counter's high word: other numbers under the same seed.
    """
    keys = (seed[0], seed[1], seed[0] ^ seed[1] ^ jnp.uint32(PARITY))
    high, low = jnp.zeros_like(counter) + (keys[0] + jnp.asarray(stream).astype(jnp.uint32)), counter + keys[1]
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            high = high + low
            low = (low << rotation) | jax.lax.shift_right_logical(low, jnp.full_like(low, 32 - rotation))
            low = low ^ high
        high = high + keys[(i + 1) % 3]
        low = low + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return high ^ low


def uniform(seed, counter, stream=0):
    """float32 in [0, 1), multiples of 2^-23; arguments as of `random_bits`."""
    bits = random_bits(seed, counter, stream)
    mantissa = jax.lax.shift_right_logical(bits, jnp.full_like(bits, 9))
    return mantissa.astype(jnp.float32) * jnp.float32(2**-23)
