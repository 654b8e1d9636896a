"""Bins and scales of 1,024 tokens on their way to shared memory: of 8 tokens a thread, for itself; for Hopper GPUs."""

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import word_of
from pallas_kernels.mosaic_certificate import scale_of
from pallas_kernels.mosaic_found import byte_of

THREAD_TOKENS = 8
CHUNK = THREAD_TOKENS * m.WARPGROUP
SCALE_WORDS = THREAD_TOKENS // 2


def chunk_words(group: int) -> int:
    """Of shared memory."""
    return m.WARPGROUP * _thread_words(group)


def _thread_words(group: int) -> int:
    """Scales, then bins, up to a multiple of 16 bytes."""
    return SCALE_WORDS + -(-2 * group // 4) * 4


class Chunk:
    """A chunk of a row of bins [R,T/8,G,2] and scale [R,T]; shared: an address, of `chunk_words`."""

    def __init__(self, row, group: int, tokens: int, bins, scale, shared):
        self._row, self._group, self._tokens, self._bins, self._scale = row, group, tokens, bins, scale
        self._mine = m.add(shared, m.multiply(m.thread_index(), 4 * _thread_words(group)))
        # Words of a thread's bins that are copied, and loaded, at a time.
        self._words = 4 if group % 2 == 0 else 2

    def begin(self, start):
        """Copies of the chunk from a token on, in the place of the one before, which this thread has done with."""
        # It may reach past the capacity, where no token is attended.
        token = m.minimum_signed(self.token(start), self._tokens - THREAD_TOKENS)
        at = m.address(self._scale, m.right(m.add(m.multiply(self._row, self._tokens), token), 1))
        m.copy(self._mine, at, words=SCALE_WORDS)
        at = m.address(self._bins, word_of(self._row, token, 0, self._group, self._tokens))
        for i in self._offsets():
            m.copy(self._mine, at, words=self._words, shared_offset=4 * SCALE_WORDS + i, offset=i)
        m.end_copies()

    def _offsets(self):
        return range(0, 8 * self._group, 4 * self._words)

    def token(self, start):
        """This thread's first one."""
        return m.add(start, m.multiply(m.thread_index(), THREAD_TOKENS))

    def words(self):
        """The words of the thread's tokens' bins, once they have arrived, 2 for each head in turn."""
        m.wait_copies(0)
        load = lambda i: m.load_shared(self._mine, words=self._words, offset=4 * SCALE_WORDS + i)  # noqa: E731
        return [word for i in self._offsets() for word in load(i)]

    def bytes_and_scale(self, i):
        """Of the thread's token i: its bytes, of each head in turn, and its scale."""
        at = m.add(self._mine, m.left(m.right(i, 2), 2))
        words = [m.load_shared(at, offset=4 * SCALE_WORDS + 8 * head)[0] for head in range(self._group)]
        (pair,) = m.load_shared(m.add(self._mine, m.left(m.right(i, 1), 2)))
        return [byte_of(word, i) for word in words], scale_of(pair, i)
