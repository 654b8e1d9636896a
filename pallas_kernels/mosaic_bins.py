"""Bins of scores, and the state in which the launches of a decode step count; for Hopper GPUs.

From a score z and a head's `base` to a bin, kept as a byte:

    depth = 8 (base - z), to the nearest 1/256
    bin = depth, rounded down, from 0 (above base; NaN, infinity) to 255 (31.9 nats below)

Bytes lie in words [B,K,T/8,G,2], lowest first: 8 tokens of each query head in turn, so that what is known of a token is
in one place.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m

BINS = 256
BINS_PER_NAT = 8
# Heads that a warp scores at a time; a group is padded to a multiple of it.
HEADS = 4
# Places of a score in its bin, and above the bins, are counted in steps of 1/256.
PLACES = 256
LOG2_E = math.log2(math.e)


def bytes_of(bins):
    """Bins in words as uint8 [B,K,G,T]."""
    batch, kv_heads, octets, group, _ = bins.shape
    octet = jax.lax.bitcast_convert_type(bins, jnp.uint8).reshape(batch, kv_heads, octets, group, 8)
    return jnp.moveaxis(octet, 3, 2).reshape(batch, kv_heads, group, 8 * octets)


def words_of(bytes_):
    """uint8 [B,K,G,T] as bins in words."""
    batch, kv_heads, group, tokens = bytes_.shape
    octet = jnp.moveaxis(bytes_.reshape(batch, kv_heads, group, tokens // 8, 2, 4), 2, 3)
    return jax.lax.bitcast_convert_type(octet, jnp.int32)


def word_of(row, token, head, group: int, tokens: int):
    """Which word of rows of bins holds a token's byte of a head; i32."""
    octet = m.add(m.multiply(row, tokens // 8), m.right(token, 3))
    pair = m.left(m.add(m.multiply(octet, group), head), 1)
    return m.add(pair, m.bit_and(m.right(token, 2), 1))


def state_words(heads: int, blocks: int) -> int:
    """Words of a kv head's state; see `State`."""
    return -(-(heads * (3 * BINS + 1) + 2 + blocks) // 256) * 256


class State:
    """Where a row's numbers lie in the state.

    bins [H,256,2]: sums of places, and counts, but for the last bin's; above [H,256]: 256 times as many tokens as are
    surely i to i + 1 bins above base; peaks [H], as unsigned numbers in the order of the f32; the bits of the largest
    scale [1]; tickets [1], of `mosaic_extend`; blocks [N], for `mosaic_compact`.
    """

    def __init__(self, ref, row, heads: int, words: int):
        self._ref, self._start, self._heads = ref, m.multiply(row, words), heads

    def bin(self, head, bin_):
        return m.address(self._ref, m.add(self._start, m.left(m.add(m.multiply(head, BINS), bin_), 1)))

    def above(self, head, bin_):
        place = m.add(m.multiply(head, BINS), bin_)
        return m.address(self._ref, m.add(self._start, m.add(place, self._heads * 2 * BINS)))

    def peak(self, head):
        return m.address(self._ref, m.add(self._start, m.add(head, self._heads * 3 * BINS)))

    def largest_scale(self):
        return m.address(self._ref, m.add(self._start, self._heads * (3 * BINS + 1)))

    def ticket(self):
        return m.address(self._ref, m.add(self._start, self._heads * (3 * BINS + 1) + 1))

    def block(self, index):
        return m.address(self._ref, m.add(self._start, m.add(index, self._heads * (3 * BINS + 1) + 2)))


def counts_and_peaks(state, heads: int, scored):
    """From a state [B,K,Z], of tokens scored int32 [B]: sums of places and counts int32 [B,K,H,256,2], and the largest
    scores float32 [B,K,H], NaN and infinity counting as 3e38 (-inf if there is none)."""
    counts = state[..., : heads * 2 * BINS].reshape(*state.shape[:-1], heads, BINS, 2)
    last = scored[:, None, None] - jnp.sum(counts[..., :-1, 1], axis=-1)
    counts = counts.at[..., -1, 1].set(last)
    key = state[..., heads * 3 * BINS : heads * (3 * BINS + 1)]
    bits = jnp.where(key < 0, key & 0x7FFFFFFF, ~key)
    return counts, jnp.where(key == 0, -jnp.inf, jax.lax.bitcast_convert_type(bits, jnp.float32))
