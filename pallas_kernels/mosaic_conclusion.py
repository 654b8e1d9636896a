"""What follows from the parts of a kv head's second round: outputs and certificates; for Hopper GPUs.

    last blocks of the kv head    parts added up (mosaic_parts.py), a warp each for some columns of a query head, or for
                                  its certificate (mosaic_certificate.py)

These blocks wait for each other. Blocks begin in order, so that at most one kv head has some that have not begun: fewer
than `LAST_BLOCKS` wait for these, and those of other kv heads for blocks that run. So it is enough if `LAST_BLOCKS`
blocks are on the device at once.
"""

import dataclasses
import functools
from typing import Any

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_certificate import certificate_of_parts, store_numbers
from pallas_kernels.mosaic_certified_threshold import DEVIATION
from pallas_kernels.mosaic_parts import OutputOfParts, Parts, SumOfParts, columns_of
from pallas_kernels.mosaic_rules import load_limits
from pallas_kernels.mosaic_top_p_threshold import warp_sum
from pallas_kernels.mosaic_warp_attention import WARPS, Sizes

LANES = 32
# The most that a kv head's tokens are split into, and the blocks that share what there is to conclude: powers of two.
LARGEST_PARTS, LAST_BLOCKS = 128, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conclusion:
    """Of a row's parts, from place `first` on in the arrays of parts.

    Attributes:
      dtype: of the output.
      number, log2_number: of the parts.
      ticket: address of a word of global memory, 0 before the first block ends.
      limits: [R,H,LIMITS], of the second round; out [R,G,D] and summary [R,G,8] are written to.
      scored: tokens scored.
    """

    sizes: Sizes
    dtype: str
    lane: Any
    row: Any
    first: Any
    number: Any
    log2_number: Any
    ticket: Any
    limits: Any
    scored: Any
    out: Any
    summary: Any

    @property
    def slices(self) -> int:
        """Of the columns that a warp adds up at a time."""
        return -(-self.sizes.head_dim // columns_of(LARGEST_PARTS))

    def conclude(self, at, peaks, totals, outs, sums, tokens):
        """The blocks that end last, once all have ended, share what there is to do. All threads have stored their part
        of the block's; `at` is the address of a word of shared memory."""
        is_first_thread = m.less(m.thread_index(), 1)
        m.when(is_first_thread, lambda: m.store_shared(at, [m.take_ticket(self.ticket)]))
        m.barrier()
        log2_blocks = m.minimum_signed(self.log2_number, LAST_BLOCKS.bit_length() - 1)
        blocks = m.left(1, log2_blocks)
        # Unsigned: that of a block that is not one of the last is far above.
        which = m.subtract(m.add(m.load_shared(at)[0], blocks), self.number)

        def share_out():
            m.when(is_first_thread, lambda: m.wait_tickets(self.ticket, self.number))
            m.barrier()
            # A warp of each block before a second one of any: what they fetch is more than what they do with it.
            first = m.add(which, m.left(m.right(m.thread_index(), 5), log2_blocks))
            each, log2_each = m.multiply(blocks, WARPS), m.add(log2_blocks, WARPS.bit_length() - 1)
            kinds = self.slices + 1
            left = m.maximum_signed(m.subtract(self.sizes.group * kinds, first), 0)
            rounds = m.right(m.add(left, m.subtract(each, 1)), log2_each)

            def one_of_head(i, _):
                some = m.add(first, m.left(i, log2_each))
                head = m.divide(some, kinds)
                kind = m.subtract(some, m.multiply(head, kinds))
                is_of_columns = m.less(kind, self.slices)
                m.when(is_of_columns, lambda: self._add_up_columns(head, kind, peaks, totals, outs))
                m.when(m.negate(is_of_columns), lambda: self._certify(head, sums, tokens))
                return []

            m.loop(rounds, [], one_of_head)

        m.when(m.less(which, blocks), share_out)

    def _add_up_columns(self, head, some, peaks, totals, outs):
        """Some columns of a query head's output, of all parts."""
        sizes = self.sizes
        of_parts = OutputOfParts(
            self._parts(head), peaks, totals, outs,
            columns=sizes.columns, usual=LARGEST_PARTS, lane=self.lane, dtype=self.dtype,
        )  # fmt: skip
        place = m.multiply(m.add(m.multiply(self.row, sizes.group), head), sizes.head_dim)
        of_parts.store(m.multiply(some, columns_of(LARGEST_PARTS)), self.out, place, sizes.head_dim)

    def _certify(self, head, sums, tokens):
        """Summary of a query head, of all parts."""
        sizes, rule = self.sizes, self.sizes.rule
        assert rule is not None
        # All that is needed is asked for before any of it is waited for.
        counts = self._load_counts(tokens)
        limits = load_limits(self.limits, m.add(m.multiply(self.row, sizes.heads), head))
        of_parts = SumOfParts(self._parts(head), sums, usual=LARGEST_PARTS, lane=self.lane)
        certificate, found = certificate_of_parts(rule, of_parts, limits, self.scored, limits[DEVIATION])
        numbers = [*certificate, found, m.to_float(warp_sum(functools.reduce(m.add, counts), m.add))]
        place = m.add(m.multiply(self.row, sizes.group), head)
        m.when(m.less(self.lane, 1), lambda: store_numbers(numbers, self.summary, place))

    def _load_counts(self, tokens):
        """Of all parts, some a lane: how many tokens they attended."""
        parts = Parts(first=self.first, number=self.number, heads=1, head=m.value(0))
        of_lane = [m.add(self.lane, i) for i in range(0, LARGEST_PARTS, LANES)]
        return [m.select(parts.has(part), parts.load(tokens, part)[0], 0) for part in of_lane]

    def _parts(self, head) -> Parts:
        return Parts(first=self.first, number=self.number, heads=self.sizes.heads, head=head)
