"""Bins and scales of 2,048 tokens on their way to shared memory: of 16 tokens a thread, for itself; for Hopper GPUs."""

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import word_of
from pallas_kernels.mosaic_certificate import scale_of
from pallas_kernels.mosaic_found import byte_of
from pallas_kernels.mosaic_rules import LANE_TOKENS, by_head

CHUNK = LANE_TOKENS * m.WARPGROUP
SCALE_WORDS = LANE_TOKENS // 2


def chunk_words(group: int) -> int:
    """Of shared memory."""
    return m.WARPGROUP * _thread_words(group)


def _thread_words(group: int) -> int:
    return group * LANE_TOKENS // 4 + SCALE_WORDS


class Chunk:
    """A chunk of a row of bins [R,T/8,G,2] and scale [R,T]; shared: an address, of `chunk_words`."""

    def __init__(self, row, group: int, tokens: int, bins, scale, shared):
        self._row, self._group, self._tokens, self._bins, self._scale = row, group, tokens, bins, scale
        self._mine = m.add(shared, m.multiply(m.thread_index(), 4 * _thread_words(group)))
        self._scales_at = 4 * (_thread_words(group) - SCALE_WORDS)

    def begin(self, start):
        """Copies of the chunk from a token on, in the place of the one before, which this thread has done with."""
        # It may reach past the capacity, where no token is attended.
        token = m.minimum_signed(self.token(start), self._tokens - LANE_TOKENS)
        at = m.address(self._bins, word_of(self._row, token, 0, self._group, self._tokens))
        for i in range(0, self._scales_at, 16):
            m.copy(self._mine, at, words=4, shared_offset=i, offset=i)
        at = m.address(self._scale, m.right(m.add(m.multiply(self._row, self._tokens), token), 1))
        for i in range(0, 4 * SCALE_WORDS, 16):
            m.copy(self._mine, at, words=4, shared_offset=self._scales_at + i, offset=i)
        m.end_copies()

    def token(self, start):
        """This thread's first one."""
        return m.add(start, m.multiply(m.thread_index(), LANE_TOKENS))

    def words(self):
        """The words of the thread's tokens' bins, once they have arrived, 4 for each head in turn."""
        m.wait_copies(0)
        words = [w for i in range(0, self._scales_at, 16) for w in m.load_shared(self._mine, words=4, offset=i)]
        return by_head(words, self._group)

    def bytes_and_scale(self, i):
        """Of the thread's token i: its bytes, of each head in turn, and its scale."""
        octet = m.multiply(m.right(i, 3), 8 * self._group)
        at = m.add(self._mine, m.add(octet, m.left(m.bit_and(m.right(i, 2), 1), 2)))
        words = [m.load_shared(at, offset=8 * head)[0] for head in range(self._group)]
        (pair,) = m.load_shared(m.add(self._mine, m.left(m.right(i, 1), 2)), offset=self._scales_at)
        return [byte_of(word, i) for word in words], scale_of(pair, i)
