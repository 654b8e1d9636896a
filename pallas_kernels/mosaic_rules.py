"""What compaction keeps of a row: rules that say in how many bins a head's tokens are kept.

A rule comes from counts of scores (mosaic_top_p_threshold.py), or from those of debiased logits
(mosaic_certified_threshold.py). The latter may keep a token in more bins than others, by its own deviation; few heads
have such tokens, which are looked for only where a head's largest scales ask for it.
"""

import dataclasses
import functools

from pallas_kernels import _mosaic as m
from pallas_kernels import mosaic_certified_threshold as certified
from pallas_kernels import mosaic_top_p_threshold as t
from pallas_kernels.mosaic_bins import HEADS, State, word_of

LANE_TOKENS = 16
LIMITS = certified.LIMITS


def comparisons(kept):
    """What `kept_tokens` compares bytes with, for each head's number of kept bins, of 0 to 256."""
    # Byte x is at least k if, of its high bit and the carry of the lower bits into it, one is set (k < 128), or both.
    # For k = 256 none is.
    return [
        (
            m.select(m.less(k, 256), m.multiply(m.subtract(128, m.bit_and(k, 127)), 0x01010101), 0),
            m.select(m.less(k, 128), 0xFFFFFFFF, 0),
        )
        for k in kept
    ]


def kept_tokens(words, compare):
    """Bits of tokens whose byte in a head's words, as many of each head in turn, is below its number of kept bins."""
    nibbles, each = [], len(words) // len(compare)
    for word in range(each):
        dropped = m.value(0x80808080)
        for head, (addend, either) in enumerate(compare):
            four = words[each * head + word]
            carries = m.add(m.bit_and(four, 0x7F7F7F7F), addend)
            dropped = m.bit_and(dropped, m.majority(carries, four, either))
        kept = m.right(m.bit_xor(dropped, 0x80808080), 7)
        # The lowest bits of four bytes, side by side.
        nibbles.append(m.right(m.multiply(kept, 0x01020408), 24))
    return functools.reduce(m.bit_or, [m.left(m.bit_and(n, 15), 4 * j) for j, n in enumerate(nibbles)])


def load_limits(limits, place):
    """A head's limits, `LIMITS` f32."""
    at = m.address(limits, m.multiply(place, LIMITS))
    return [m.as_float(word) for i in range(0, LIMITS, 4) for word in m.load(at, words=4, offset=4 * i)]


def _load_floats(arrays, place):
    return [m.as_float(m.load(m.address(x, place))[0]) for x in arrays]


class Rule:
    """What a head keeps. `INPUTS` arrays say it, beside the bins and, if `COUNTED`, the state; in shared memory it is
    `WORDS` words, the first being how many bins are kept."""

    INPUTS: int
    WORDS: int
    COUNTED = True

    @property
    def margin(self) -> bool:
        """Whether any token is kept for its deviation."""
        return False

    def length(self, inputs, row, length):
        """Tokens of the row that may be listed, of those of its sequence."""
        del inputs, row
        return length

    def find(self, inputs, place, head, lane, state: State, scored):
        """A head's words, the same in all lanes, of so many tokens scored; and a function of the arrays of reports and
        the place there."""
        raise NotImplementedError

    def candidates(self, heads: int, shared):
        """A function of words and the bits that are kept of them by how many bins are: 16 bits, of the tokens that are
        kept besides if they are of the right scales."""
        del heads, shared
        return lambda words, bits: m.value(0)

    def load_margins(self, heads: int, shared):
        """What `is_kept` compares with, for each head; of a rule that has candidates."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopP(Rule):
    """Bins that hold a share of the estimated mass."""

    top_p: float
    INPUTS, WORDS = 2, 1

    def find(self, inputs, place, head, lane, state: State, scored):
        top, lse = _load_floats(inputs, place)
        counted = t.LaneBins.load(state, head, lane).counted(lane, scored)
        kept, tokens, share = t.threshold(self.top_p, lane, counted, top, lse)

        def report(reports, place):
            m.store(m.address(reports[0], place), [tokens])
            m.store(m.address(reports[1], place), [m.as_int(share)])

        return [kept], report


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ByDeviation(Rule):
    """Bins kept for all tokens, and more for those whose scores could be those of single tokens of great weight."""

    group: int
    WORDS = 5

    @property
    def margin(self) -> bool:
        """Whether any token is kept for its deviation."""
        return True

    def candidates(self, heads: int, shared):
        if not self.margin:
            return super().candidates(heads, shared)
        load = lambda i: [m.load_shared(shared, offset=4 * (heads * i + h))[0] for h in range(self.group)]  # noqa: E731
        matters = functools.reduce(m.either, map(m.less, load(0), load(1)))

        def find(words, bits):
            # Loaded anew each time: registers are few.
            look = lambda _: [m.bit_and(kept_tokens(words, comparisons(load(1))), m.bit_xor(bits, 0xFFFF))]  # noqa: E731
            return m.update(matters, [m.value(0)], look)[0]

        return find

    def load_margins(self, heads: int, shared):
        return [
            [m.as_float(m.load_shared(shared, offset=4 * (heads * i + head))[0]) for i in (2, 3, 4)]
            for head in range(self.group)
        ]


def is_kept(bytes_, scale, margins):
    """Whether a token of some scale is kept for its deviation by a head; bytes and margins of each head in turn."""
    kept = [m.less(byte, m.add(certified.bins_of(scale, *x), 1)) for byte, x in zip(bytes_, margins, strict=True)]
    return functools.reduce(m.either, kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights(_ByDeviation):
    """Bins that hold a share of the true mass."""

    rule: certified.Rule
    INPUTS = 4

    @property
    def margin(self) -> bool:
        return self.rule.certified

    def find(self, inputs, place, head, lane, state: State, scored):
        top, lse, noise = _load_floats(inputs[:3], place)
        limits = certified.find_limits(self.rule, lane, state, head, scored, top, lse, noise)

        def report(reports, place):
            at = m.address(reports[0], m.multiply(place, LIMITS))
            for i in range(0, LIMITS, 4):
                m.store(at, [m.as_int(x) for x in limits[i : i + 4]], offset=4 * i)

        return certified.words(limits, self.rule.deviations), report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(_ByDeviation):
    """Bins that limits say, in kv heads of which one is short (`mosaic_verify`)."""

    deviations: float
    INPUTS, COUNTED = 3, False

    def length(self, inputs, row, length):
        heads = -(-self.group // HEADS) * HEADS
        at = m.address(inputs[1], m.multiply(row, heads))
        marks = [m.load(at, offset=4 * head)[0] for head in range(self.group)]
        return m.select(m.less(0, functools.reduce(m.bit_or, marks)), length, 0)

    def find(self, inputs, place, head, lane, state: State | None, scored):
        return certified.words(load_limits(inputs[0], place), self.deviations), lambda reports, place: None


def load_words(bins, row, token, group: int, tokens: int):
    """The words of the bins of `LANE_TOKENS` tokens from one on, 4 for each head in turn."""
    # A block may reach past the capacity, where no token is attended.
    token = m.minimum_signed(token, tokens - LANE_TOKENS)
    at = m.address(bins, word_of(row, token, 0, group, tokens))
    words = [w for i in range(group) for w in m.load(at, words=4, offset=16 * i)]
    pairs = [words[i : i + 2] for i in range(0, 4 * group, 2)]
    return [w for head in range(group) for w in pairs[head] + pairs[group + head]]


def scored_and_others(token, *, sink: int, quantized, length, number: int = LANE_TOKENS):
    """Bits of so many tokens from one on: those that are scored, and those that are attended whatever is kept."""
    sinks, coded, held = (_bits_below(limit, token, number) for limit in (m.value(sink), quantized, length))
    is_scored = m.bit_and(coded, m.bit_xor(sinks, 0xFFFF))
    return m.bit_and(held, is_scored), m.bit_and(held, m.bit_xor(is_scored, 0xFFFF))


def _bits_below(limit, token, number: int):
    """So many bits, one where token + i < limit."""
    count = m.minimum_signed(m.maximum_signed(m.subtract(limit, token), 0), number)
    return m.subtract(m.left(1, count), 1)
