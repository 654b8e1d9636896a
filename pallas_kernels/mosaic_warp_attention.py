"""Exact attention of all query heads of a kv head by each warp of a block, on the tensor core; for Hopper GPUs.

warp      16 places of a list of tokens at a time; lane 4 g + t, of each eight heads (there are one or two),
          queries x keys      8 dims t, t + 4, ... of query g and of keys g, g + 8: keys are read in whole sectors
          softmax             head g, places 2 t, 2 t + 1, 2 t + 8, 2 t + 9
          weights x values    head g, of every 64 columns 16 t .. 16 t + 15
          terms               of what was found (mosaic_found.py), as the softmax; up to four heads take half a warp,
                              so that its other half has half of the places
          What a lane reads is copied to its own words of shared memory, a tile ahead.
block     the parts of its warps, added up by a warp for a head
"""

import dataclasses
import functools
from typing import Any

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import HEADS, word_of
from pallas_kernels.mosaic_certificate import scale_of
from pallas_kernels.mosaic_certified_threshold import Rule
from pallas_kernels.mosaic_found import KINDS, Found, byte_of, sums_of_quads
from pallas_kernels.mosaic_parts import LOWEST
from pallas_kernels.mosaic_products import CHUNK, OCTET, eights_product, load_chunks, products
from pallas_kernels.mosaic_rules import load_limits
from pallas_kernels.mosaic_top_p_threshold import exp

WARPS, PLACES, LANES = 4, 16, 32
# Tiles that are in shared memory: one that is worked on, and one that is under way. With three, too little is left for
# the L1, through which copies of 16 bytes become those of whole lines.
STAGES = 2
# Of a token's value, the eight lanes with one t have eight loads at a time.
COLUMNS = 8 * CHUNK
LARGEST_GROUP, LARGEST_COLUMNS = 16, 256


def takes(group: int, head_dim: int, dtype: str) -> bool:
    """Whether a warp has the registers for so many query heads of so many dims."""
    octets = -(-group // OCTET)
    return (
        dtype in ("bfloat16", "float16")
        and head_dim % CHUNK == 0
        and group <= LARGEST_GROUP
        and octets * head_dim <= LARGEST_COLUMNS
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of R rows of query heads [R,G,D] and of keys and values [R,T,D]. `rule` is None where no sums are made."""

    kv_heads: int
    rows: int
    group: int
    tokens: int
    head_dim: int
    dtype: str
    softmax_scale: float
    sink: int
    rule: Rule | None

    @property
    def heads(self) -> int:
        return -(-self.group // HEADS) * HEADS

    @property
    def octets(self) -> int:
        return -(-self.group // OCTET)

    @property
    def chunks(self) -> int:
        return self.head_dim // CHUNK

    @property
    def columns(self) -> int:
        """Of an output: D, and what is missing to a multiple of 64."""
        return -(-self.head_dim // COLUMNS) * COLUMNS

    @property
    def kinds(self) -> int:
        return KINDS if self.rule else 0

    @property
    def term_heads(self) -> int:
        """Heads of which a lane has terms."""
        return self.octets if self.rule else 0

    @property
    def term_places(self) -> int:
        """Places of a tile of which it has them."""
        return 2 if self.group <= HEADS else 4

    # A tile in shared memory: words of keys, values and what else is known of its tokens, [.., 32] each.
    @property
    def values_at(self) -> int:
        return 2 * LANES * 4 * -(-self.chunks // 4)

    @property
    def known_at(self) -> int:
        return self.values_at + 4 * LANES * 4 * (self.columns // COLUMNS)

    @property
    def tile_words(self) -> int:
        return self.known_at + 2 * LANES * self.term_places * self.term_heads

    # A warp's part, in the place of its tiles: peaks and totals [H,2], sums [H,KINDS], outputs [H,C].
    @property
    def sums_at(self) -> int:
        return 2 * self.heads

    @property
    def outs_at(self) -> int:
        return self.sums_at + self.heads * self.kinds

    @property
    def warp_words(self) -> int:
        return max(STAGES * self.tile_words, self.outs_at + self.heads * self.columns)

    @property
    def shared_words(self) -> int:
        return WARPS * self.warp_words


@dataclasses.dataclass
class _Eight:
    """What a warp has of eight query heads: their peaks, and of this lane totals, columns and sums."""

    peak: Any
    total: Any
    columns: list
    sums: list

    @classmethod
    def size(cls, sizes: Sizes) -> int:
        return 2 + sizes.columns // 4 + sizes.kinds

    @classmethod
    def of(cls, sizes: Sizes, flat) -> "_Eight":
        peak, total, *rest = flat
        return cls(peak, total, rest[: sizes.columns // 4], rest[sizes.columns // 4 :])

    @property
    def flat(self):
        return [self.peak, self.total, *self.columns, *self.sums]

    def raise_peak(self, logits, valid):
        """The peak, and all that is in its units; returns the weights of these places, which it adds to the total."""
        places = list(zip(logits, valid, strict=True))
        highest = functools.reduce(m.maximum, [m.select(is_listed, x, LOWEST) for x, is_listed in places])
        for lanes in (1, 2):
            highest = m.maximum(highest, m.shuffle_xor(highest, lanes))
        peak = m.maximum(self.peak, highest)
        decay = exp(m.subtract_float(self.peak, peak))
        weights = [m.select(is_listed, exp(m.subtract_float(x, peak)), 0.0) for x, is_listed in places]
        self.peak, self.total = peak, m.fma(self.total, decay, functools.reduce(m.add_float, weights))
        self.columns = [m.multiply_float(x, decay) for x in self.columns]
        return weights


class WarpAttention:
    """A warp's attention over tokens of a row.

    query [R,G,D], keys and values [R,T,D], of one dtype; shared: an address, of `Sizes.shared_words` words for the
    block; and where sums are made bins [R,T/8,G,2], scale [R,T], limits [R,H,LIMITS], and the number of scored tokens.
    """

    def __init__(
        self, sizes: Sizes, lane, row, query, keys, values, shared, *, bins=None, scale=None, limits=None, scored=None
    ):
        self.sizes, self.row, self.keys, self.values, self._shared = sizes, row, keys, values, shared
        self.bins, self.scale, self.scored = bins, scale, scored
        self.first_token = m.multiply(row, sizes.tokens)
        self.warp = m.right(m.thread_index(), 5)
        self.lane, self.g, self.t = lane, m.right(lane, 2), m.bit_and(lane, 3)
        # Heads that are not real do what the last one does, and store nothing.
        heads = [m.minimum_signed(m.add(self.g, OCTET * i), sizes.group - 1) for i in range(sizes.octets)]
        place_of = lambda head: m.add(m.multiply(row, sizes.group), head)  # noqa: E731
        self.query = [load_chunks(query, place_of(head), sizes.head_dim, self.t) for head in heads]
        self.is_half = sizes.group <= HEADS
        self.is_upper = m.not_less(lane, 16)
        if self.is_half:
            heads = [m.minimum_signed(m.bit_and(self.g, HEADS - 1), sizes.group - 1)]
        self.term_heads = heads
        self.found: list[Found] = []
        if sizes.rule is not None:
            first = m.multiply(row, sizes.heads)
            self.found = [Found(sizes.rule, load_limits(limits, m.add(first, head))) for head in heads]

    def start(self):
        """What the warp has before its first token: numbers to be carried."""
        eight = [m.value(LOWEST), *[m.value(0.0)] * (_Eight.size(self.sizes) - 1)]
        return eight * self.sizes.octets

    def attend(self, begin, end, listed, carried):
        """What is carried, with the tokens of a list's places `begin` to `end`, of which every fourth 16 are this
        warp's.

        Args:
          listed: a function, from a place to the token there, to be called for this lane's place of a tile.
        """
        ahead = STAGES - 1
        first = m.add(begin, m.multiply(self.warp, PLACES))
        place_of = lambda i: m.add(first, m.multiply(i, PLACES * WARPS))  # noqa: E731
        tiles = m.divide(m.add(m.subtract(end, m.minimum_signed(first, end)), PLACES * WARPS - 1), PLACES * WARPS)

        def token_of(i):
            # Places behind the end are those of the last token.
            place = m.add(place_of(i), m.bit_and(self.lane, PLACES - 1))
            return listed(m.minimum_signed(place, m.subtract(end, 1)))

        def copy(i, token):
            m.when(m.less(i, tiles), lambda: self._copy(self._tile(i), token))
            m.end_copies()

        tokens = [token_of(m.value(i)) for i in range(ahead + 1)]
        for i, token in enumerate(tokens[:ahead]):
            copy(m.value(i), token)

        def attend_tile(i, carried):
            tokens, progress = carried[: ahead + 1], carried[ahead + 1 :]
            # The tokens of a tile are known before their keys and values are asked for.
            following = token_of(m.add(i, ahead + 1))
            copy(m.add(i, ahead), tokens[-1])
            m.wait_copies(ahead)
            return [*tokens[1:], following, *self._attend(self._tile(i), tokens[0], place_of(i), end, progress)]

        return m.loop(tiles, [*tokens, *carried], attend_tile)[ahead + 1 :]

    def _tile(self, i):
        """Address of this lane's words of a tile."""
        stage = m.subtract(i, m.multiply(m.divide(i, STAGES), STAGES))
        return self.shared(0, m.add(m.multiply(stage, self.sizes.tile_words), m.left(self.lane, 2)))

    def _offsets(self):
        """Of this lane's places in a tile."""
        return [m.add(m.left(self.t, 1), i) for i in (0, 1, 8, 9)]

    def _copy(self, tile, token):
        """Begin to copy what a tile takes, whose tokens are `token` in lanes of their places."""
        sizes = self.sizes
        for i in range(2):
            key = m.shuffle(token, m.add(self.g, OCTET * i))
            self._copy_chunks(tile, i * (sizes.values_at // 2), self.keys, key, self.t, 4)
        tokens = [m.shuffle(token, offset) for offset in self._offsets()]
        size = (sizes.known_at - sizes.values_at) // 4
        for i, one in enumerate(tokens):
            self._copy_chunks(tile, sizes.values_at + i * size, self.values, one, self.g, 8)
        if sizes.rule is None:
            return
        at_word = m.subtract(tile, m.multiply(self.lane, 12))
        for i, (token, head) in enumerate(self._of_terms(self._halved(tokens))):
            words = (
                m.address(self.scale, m.right(m.add(self.first_token, token), 1)),
                m.address(self.bins, word_of(self.row, token, head, sizes.group, sizes.tokens)),
            )
            for j, at in enumerate(words):
                m.copy(at_word, at, words=1, shared_offset=4 * (sizes.known_at + LANES * (2 * i + j)))

    def _of_terms(self, *of_places):
        """Of each place and head of which this lane has terms, what is given of the places; and the head."""
        return [(*at, head) for head in self.term_heads for at in zip(*of_places, strict=True)]

    def _attend(self, tile, token, first, end, carried):
        """What is carried, with a tile whose copies have arrived; places from `end` on have no weight."""
        sizes = self.sizes
        eights = self._eights(carried)
        left = m.maximum_signed(m.subtract(end, first), 0)
        valid = [m.less(offset, left) for offset in self._offsets()]
        logits = self._logits(tile)
        weights = [eight.raise_peak(x, valid) for eight, x in zip(eights, logits, strict=True)]
        if sizes.rule is not None:
            tokens = [m.shuffle(token, offset) for offset in self._offsets()]
            self._add_terms(eights, tile, self._halved(tokens), self._halved(valid), logits)
        self._add_values(eights, weights, tile)
        return [x for eight in eights for x in eight.flat]

    def _add_terms(self, eights, tile, tokens, valid, logits):
        sizes, found = self.sizes, list(zip(self.found, eights, strict=True))
        mine = [self._halved_values(x) for x in logits]
        at = m.subtract(tile, m.multiply(self.lane, 12))
        for i, (token, is_listed, _) in enumerate(self._of_terms(tokens, valid)):
            octet, place = divmod(i, sizes.term_places)
            words = [m.load_shared(at, offset=4 * (sizes.known_at + LANES * (2 * i + j)))[0] for j in range(2)]
            known, eight = found[octet]
            terms = self._terms(known, token, is_listed, mine[octet][place], words)
            eight.sums = [m.add_float(x, y) for x, y in zip(eight.sums, terms, strict=True)]

    def _eights(self, carried):
        size = _Eight.size(self.sizes)
        return [_Eight.of(self.sizes, carried[size * i : size * (i + 1)]) for i in range(self.sizes.octets)]

    def _copy_chunks(self, tile, to: int, ref, token, first, lanes: int):
        """Chunks `first`, `first + lanes`, ... of a token's numbers; past their end, anything of it."""
        chunks = self.sizes.chunks
        at = m.row_address(ref, m.add(self.first_token, token), self.sizes.head_dim // 2)
        start = m.advance(at, m.left(first, 2))
        for j in range(-(-chunks // lanes)):
            shared_offset = 4 * (to + 4 * LANES * j)
            if lanes * (j + 1) <= chunks:
                m.copy(tile, start, words=4, shared_offset=shared_offset, offset=16 * lanes * j)
            else:
                last = m.minimum_signed(m.add(first, lanes * j), chunks - 1)
                m.copy(tile, m.advance(at, m.left(last, 2)), words=4, shared_offset=shared_offset)

    def _logits(self, tile):
        """Of each eight heads, those of this lane's four places."""
        sizes, of_keys = self.sizes, []
        for key in range(2):
            first = key * (sizes.values_at // 2)
            offsets = [4 * (first + 4 * LANES * j) for j in range(-(-sizes.chunks // 4))]
            chunks = (m.load_shared(tile, words=4, offset=offset) for offset in offsets)
            of_keys.append(products(sizes.dtype, self.query, chunks))
        logits = [[x for key in of_keys for x in key[i]] for i in range(sizes.octets)]
        logits = [[m.multiply_float(x, sizes.softmax_scale) for x in eight] for eight in logits]
        # Minus infinity comes from a key or query that is not finite, and would pass as a token without weight.
        return [[m.select(m.less_float(x, -3.4e38), float("nan"), x) for x in eight] for eight in logits]

    def _add_values(self, eights, weights, tile):
        """Add what the values of this lane's four places weigh."""
        sizes = self.sizes
        size = (sizes.known_at - sizes.values_at) // 4
        words = [[m.pack_pair(sizes.dtype, *w[:2]), m.pack_pair(sizes.dtype, *w[2:])] for w in weights]
        for j in range(sizes.columns // COLUMNS):
            to = sizes.values_at + 4 * LANES * j
            values = [m.load_shared(tile, words=4, offset=4 * (to + size * k)) for k in range(4)]
            for i in range(CHUNK):
                pick = m.high_halves if i % 2 else m.low_halves
                four = [value[i // 2] for value in values]
                at = (CHUNK * j + i) * 2
                c = [x for eight in eights for x in eight.columns[at : at + 2]]
                c += [m.value(0.0)] * (4 - len(c))
                product = eights_product(sizes.dtype, words, [pick(*four[:2]), pick(*four[2:])], c)
                for k, eight in enumerate(eights):
                    eight.columns[at : at + 2] = product[2 * k : 2 * k + 2]

    def _halved(self, four):
        """Of four places' numbers or conditions, this half's two where a half of the lanes has all heads."""
        if not self.is_half:
            return four
        return [m.select(self.is_upper, high, low) for low, high in zip(four[:2], four[2:], strict=True)]

    def _halved_values(self, four):
        """The same of numbers that lanes of the lower half have."""
        if not self.is_half:
            return four
        return self._halved(four[:2] + [m.shuffle_xor(x, 16) for x in four[2:]])

    def _terms(self, found: Found, token, is_listed, logit, words):
        pair, word = words
        bin_, scale = byte_of(word, token), scale_of(pair, m.add(self.first_token, token))
        # In unsigned numbers: sinks are far above.
        is_scored = m.both(is_listed, m.less(m.subtract(token, self.sizes.sink), self.scored))
        is_found = m.both(is_scored, m.less(bin_, found.kept(scale)))
        is_own = m.either(is_found, m.both(is_listed, m.negate(is_scored)))
        return found.masses(logit, is_listed, is_own) + found.terms(logit, bin_, scale, is_found)

    def shared(self, place, word: Any = 0, warp: int | None = None):
        """Address of a word of a warp's shared memory, from a place on; of this warp's by default."""
        number = self.warp if warp is None else m.value(warp)
        start = m.add(self._shared, m.multiply(number, 4 * self.sizes.warp_words))
        return m.add(start, m.left(m.add(word, place), 2))

    def share(self, carried):
        """The warp's part, to shared memory."""
        sizes = self.sizes
        for i, eight in enumerate(self._eights(carried)):
            total = eight.total
            for lanes in (1, 2):
                total = m.add_float(total, m.shuffle_xor(total, lanes))
            # Pairs of kinds, lane by lane; halves that have the same heads together.
            pair = sums_of_quads(self.t, eight.sums, halves=self.is_half) if sizes.rule else []
            head = m.add(self.g, OCTET * i)
            store = functools.partial(self._share_head, head, eight, total, pair)
            m.when(m.less(head, sizes.group), store)

    def _share_head(self, head, eight: _Eight, total, pair):
        sizes, words = self.sizes, lambda numbers: [m.as_int(x) for x in numbers]
        at = self.shared(0, m.left(head, 1))
        m.when(m.less(self.t, 1), lambda: m.store_shared(at, words([eight.peak, total])))
        if pair:
            m.store_shared(self.shared(sizes.sums_at, m.add(m.left(head, 3), m.left(self.t, 1))), words(pair))
        first = m.add(m.multiply(head, sizes.columns), m.left(self.t, 4))
        for j in range(sizes.columns // COLUMNS):
            chunk = eight.columns[2 * CHUNK * j : 2 * CHUNK * (j + 1)]
            for k in (0, 1):
                mine = words(chunk[k::2])
                for i in (0, 4):
                    at = self.shared(sizes.outs_at + COLUMNS * j + CHUNK * k + i, first)
                    m.store_shared(at, mine[i : i + 4])

    def add_up_warps(self, part, peaks, totals, outs, sums=None):
        """The parts of all warps, to a place of arrays [N,H], [N,H], [N,H,C] and [N,H,KINDS]. What `share` stored must
        be there."""
        for first in range(0, self.sizes.heads, WARPS):
            head = m.add(self.warp, first)
            add_up = functools.partial(self._add_up_head, head, part, peaks, totals, outs, sums)
            m.when(m.less(head, self.sizes.group), add_up)

    def _add_up_head(self, head, part, peaks, totals, outs, sums):
        sizes = self.sizes
        place = m.add(m.multiply(part, sizes.heads), head)
        of_warps = lambda at, word, words=1: [  # noqa: E731
            m.load_shared(self.shared(at, word, warp), words=words) for warp in range(WARPS)
        ]
        pairs = of_warps(0, m.left(head, 1), words=2)
        all_peaks = [m.as_float(peak) for peak, _ in pairs]
        peak = functools.reduce(m.maximum, all_peaks)
        weights = [exp(m.subtract_float(one, peak)) for one in all_peaks]
        weigh = lambda numbers: functools.reduce(  # noqa: E731
            m.add_float, [m.multiply_float(m.as_float(x), w) for x, w in zip(numbers, weights, strict=True)]
        )
        is_first_lane = m.less(self.lane, 1)
        m.store(m.address(peaks, place), [m.as_int(peak)], where=is_first_lane)
        m.store(m.address(totals, place), [m.as_int(weigh([total for _, total in pairs]))], where=is_first_lane)
        if sums is not None:
            kind = m.bit_and(self.lane, KINDS - 1)
            found = [m.as_float(x) for (x,) in of_warps(sizes.sums_at, m.add(m.left(head, 3), kind))]
            at = m.address(sums, m.add(m.multiply(place, KINDS), kind))
            m.store(at, [m.as_int(functools.reduce(m.add_float, found))], where=m.less(self.lane, KINDS))
        for first in range(0, sizes.columns, LANES):
            column = m.add(self.lane, first)
            value = weigh([x for (x,) in of_warps(sizes.outs_at, m.add(m.multiply(head, sizes.columns), column))])
            m.store(m.address(outs, m.add(m.multiply(place, sizes.columns), column)), [m.as_int(value)])
