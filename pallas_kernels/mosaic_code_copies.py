"""Codes on their way to a warp's shared memory, some steps before they are scored; for Hopper GPUs.

    run       neighbouring tokens, a warp's part of a block: scales and, if there are any, biases, copied at its begin
    step      32 of them: codes, copied some steps ahead
    copies    16 bytes a lane: 4 words of a token's code, or the codes of two tokens where these have 2 words
    loads     the fragments of mosaic_scorers.py: lane 4 g + t gets word t of tokens 4 g .. 4 g + 3

Copies take 8 neighbouring pieces of 16 bytes at a time, loads every fourth: a piece's place is its number with the two
bits above the lowest three added to those (exclusive or), so that neither meet in a bank.
"""

import dataclasses

from pallas_kernels import _mosaic as m

STEP_TOKENS = 32
WARPS = 4
# Steps that a warp has in shared memory: one that is scored, and those under way.
STAGES = 4
PIECE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSizes:
    """Of steps of a run, words of a code, and arrays of bfloat16 besides; in shared memory, words."""

    steps: int
    words: int
    arrays: int

    @property
    def stage_words(self) -> int:
        return STEP_TOKENS * self.words

    @property
    def array_words(self) -> int:
        return STEP_TOKENS * self.steps // 2

    @property
    def warp_words(self) -> int:
        return STAGES * self.stage_words + self.arrays * self.array_words

    @property
    def shared_words(self) -> int:
        return WARPS * self.warp_words


class CodeCopies:
    """A warp's run, from a token of a row on.

    bits [R,T,W]; halves: arrays [R,T] of bfloat16; shared: an address, of `RunSizes.shared_words` words for the block.
    """

    def __init__(self, sizes: RunSizes, token, bits, halves, shared):
        self.sizes, self._token, self._bits, self._halves = sizes, token, bits, halves
        self._lane = m.bit_and(m.thread_index(), 31)
        self._shared = m.add(shared, m.multiply(m.right(m.thread_index(), 5), 4 * sizes.warp_words))
        # Matrix i of 8 rows has the pieces of tokens 4 g + i, or the pieces 2 g + i.
        number, g = m.right(self._lane, 3), m.bit_and(self._lane, 7)
        self._mine = m.add(self._shared, m.left(_place(m.add(m.left(g, 1 if sizes.words == 2 else 2), number)), 4))
        self._target = m.add(self._shared, m.left(_place(self._lane), 4))

    def begin(self):
        """Scales and biases, and the codes of the first steps."""
        sizes = self.sizes
        for j, array in enumerate(self._halves):
            for first in range(0, sizes.array_words, 4 * 32):
                word = m.add(m.left(self._lane, 2), first)
                offset = 4 * (STAGES * sizes.stage_words + sizes.array_words * j)
                m.copy(
                    m.add(self._shared, m.left(word, 2)), m.address(array, m.add(m.right(self._token, 1), word)),
                    words=4, shared_offset=offset,
                    where=None if first + 4 * 32 <= sizes.array_words else m.less(word, sizes.array_words),
                )  # fmt: skip
        for i in range(STAGES - 1):
            self._copy_step(m.value(i), i)

    def _copy_step(self, i, stage):
        """Begin to copy a step's codes to a stage; past the last step, nothing."""
        words = self.sizes.words
        where, token = m.less(i, self.sizes.steps), m.add(self._token, m.left(i, 5))
        token = m.add(token, m.left(self._lane, 1 if words == 2 else 0))
        if words == 2:
            where = m.both(where, m.less(self._lane, STEP_TOKENS // 2))
        target, at = self._stage(self._target, stage), m.address(self._bits, m.multiply(token, words))
        for k in range(0, words, 4):
            m.copy(target, at, words=4, shared_offset=PIECE * STEP_TOKENS * k // 4, offset=4 * k, where=where)
        m.end_copies()

    def _stage(self, at, stage):
        return m.add(at, m.multiply(stage, 4 * self.sizes.stage_words))

    def arrive(self, i, stage):
        """Wait for step i, at a stage; the next copies begin, to the place of the step before."""
        m.wait_copies(STAGES - 2)
        m.warp_barrier()
        ahead = m.add(stage, STAGES - 1)
        self._copy_step(m.add(i, STAGES - 1), m.bit_and(ahead, STAGES - 1))

    def fragments(self, stage):
        """Words of codes, [token of 4][words of it, 4 apart], or of the two tokens' codes in a row, [row of 2][1]."""
        words = self.sizes.words
        at, matrices = self._stage(self._mine, stage), 2 if words == 2 else 4
        by_step = [m.load_matrices(at, matrices, offset=PIECE * STEP_TOKENS * k // 4) for k in range(0, words, 4)]
        return [list(row) for row in zip(*by_step, strict=True)]

    def halves(self, i):
        """Two words a lane of each array: of tokens 4 g .. 4 g + 3 of step i."""
        sizes = self.sizes
        at = m.add(self._shared, m.add(m.left(i, 6), m.left(m.right(self._lane, 2), 3)))
        first = 4 * STAGES * sizes.stage_words
        return [m.load_shared(at, words=2, offset=first + 4 * sizes.array_words * j) for j in range(sizes.arrays)]

    def scale_words(self):
        """A lane's share of the words of the first array, once all have arrived: the first token of each in the run,
        and the word; past the last one, zero."""
        words = []
        for first in range(0, self.sizes.array_words, 32):
            word = m.add(self._lane, first)
            is_real = m.less(word, self.sizes.array_words)
            at = m.add(self._shared, m.left(m.select(is_real, word, 0), 2))
            (pair,) = m.load_shared(at, offset=4 * STAGES * self.sizes.stage_words)
            words.append((m.left(word, 1), m.select(is_real, pair, 0)))
        return words


def _place(piece):
    """Where of 32 pieces one lies."""
    return m.bit_xor(piece, m.bit_and(m.right(piece, 3), 3))
