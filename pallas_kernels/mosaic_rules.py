"""What compaction keeps of a row: rules that say in how many bins a head's tokens are kept.

A rule comes from counts of scores (mosaic_top_p_threshold.py), or from the weights of scores with noise
(mosaic_certified_threshold.py). The latter may keep a token in more bins than others, by its own deviation; few heads
have such tokens, which are looked for only where a head's largest scales ask for it.
"""

import dataclasses
import functools

from pallas_kernels import _mosaic as m
from pallas_kernels import mosaic_certified_threshold as certified
from pallas_kernels import mosaic_top_p_threshold as t
from pallas_kernels.mosaic_bins import BINS, State

LANE_TOKENS = 16
LIMITS = certified.LIMITS
# Where the bound is among the numbers of a `rabitq_jax.certificate.Round`.
BOUND = 5


def _load_floats(arrays, place):
    return [m.as_float(m.load(m.address(x, place))[0]) for x in arrays]


class Rule:
    """What a head keeps. `INPUTS` arrays say it, beside the bins and, if `COUNTED`, the state; in shared memory it is
    `WORDS` words, the first being how many bins are kept."""

    INPUTS: int
    WORDS: int
    COUNTED = True

    def length(self, inputs, row, length):
        """Tokens of the row that may be listed, of those of its sequence."""
        del inputs, row
        return length

    def find(self, inputs, place, head, lane, scored, state: State):
        """A head's words, the same in all lanes; and a function of the arrays of reports and the place there."""
        raise NotImplementedError

    def more(self, heads: int, tokens: int, inputs, row, token, words, kept, shared):
        """16 bits, of tokens that are kept besides; None where the rule has no such tokens."""
        del heads, tokens, inputs, row, token, words, kept, shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopP(Rule):
    """Bins that hold a share of the estimated mass."""

    top_p: float
    INPUTS, WORDS = 2, 1

    def find(self, inputs, place, head, lane, scored, state: State):
        top, lse = _load_floats(inputs, place)
        peak = t.from_key(m.load(state.peak(head))[0])
        words, above = t.load_bins(state, head, lane)
        kept, tokens, share = t.threshold(self.top_p, lane, words[::2], words[1::2], above, top, peak, lse)

        def report(reports, place):
            m.store(m.address(reports[0], place), [tokens])
            m.store(m.address(reports[1], place), [m.as_int(share)])

        return [kept], report


class _ByDeviation(Rule):
    """Bins kept for all tokens, and more for those whose scores could be those of single tokens of great weight."""

    WORDS = 3

    @property
    def margin(self) -> bool:
        """Whether any token is kept for its deviation."""
        return True

    def more(self, heads: int, tokens: int, inputs, row, token, words, kept, shared):
        if not self.margin:
            return None
        depths, gains = (
            [m.as_float(m.load_shared(shared, offset=4 * (heads * i + head))[0]) for head in range(len(kept))]
            for i in (1, 2)
        )

        def look(_):
            at = m.minimum_signed(token, tokens - LANE_TOKENS)
            at = m.address(inputs[-1], m.right(m.add(m.multiply(row, tokens), at), 1))
            pairs = [w for i in range(LANE_TOKENS // 8) for w in m.load(at, words=4, offset=16 * i)]
            scales = [x for pair in pairs for x in m.bfloat16_pair(pair)]
            largest = functools.reduce(m.maximum, scales)
            bits = [m.value(0)]
            for head, (depth, gain, kept_by_all) in enumerate(zip(depths, gains, kept, strict=True)):
                matters = m.not_less(certified.bins_of(depth, gain, largest), kept_by_all)
                bits = m.update(matters, bits, functools.partial(look_at_head, head, depth, gain, scales))
            return bits

        def look_at_head(head, depth, gain, scales, bits):
            (found,) = bits
            for i, scale in enumerate(scales):
                byte = m.bit_and(m.right(words[LANE_TOKENS // 4 * head + i // 4], 8 * (i % 4)), BINS - 1)
                is_kept = m.less(byte, m.add(certified.bins_of(depth, gain, scale), 1))
                found = m.bit_or(found, m.select(is_kept, 1 << i, 0))
            return [found]

        deepest = functools.reduce(m.maximum, depths)
        return m.update(m.less_float(certified.NEVER, deepest), [m.value(0)], look)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights(_ByDeviation):
    """Bins that hold a share of the true mass."""

    rule: certified.Rule
    INPUTS = 4

    @property
    def margin(self) -> bool:
        return self.rule.certified

    def find(self, inputs, place, head, lane, scored, state: State):
        top, lse, noise = _load_floats(inputs[:3], place)
        limits = certified.find_limits(self.rule, lane, state, head, top, lse, noise, scored)

        def report(reports, place):
            at = m.address(reports[0], m.multiply(place, LIMITS))
            for i in range(0, LIMITS, 4):
                m.store(at, [m.as_int(x) for x in limits[i : i + 4]], offset=4 * i)

        largest_scale = m.as_float(m.load(state.largest_scale())[0])
        return certified.words(limits, self.rule.deviations, largest_scale), report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(_ByDeviation):
    """Bins that limits say, in kv heads where a bound is below p."""

    deviations: float
    top_p: float
    group: int
    numbers: int
    INPUTS, COUNTED = 3, False

    def length(self, inputs, row, length):
        at = m.address(inputs[1], m.multiply(row, self.group * self.numbers))
        bounds = [m.as_float(m.load(at, offset=4 * (self.numbers * head + BOUND))[0]) for head in range(self.group)]
        short = functools.reduce(m.either, [m.less_float(bound, self.top_p) for bound in bounds])
        return m.select(short, length, 0)

    def find(self, inputs, place, head, lane, scored, state: State):
        at = m.address(inputs[0], m.multiply(place, LIMITS))
        limits = [m.as_float(word) for i in range(0, LIMITS, 4) for word in m.load(at, words=4, offset=4 * i)]
        return certified.words(limits, self.deviations, None), lambda reports, place: None
