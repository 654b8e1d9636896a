"""`prepare_query`, of bfloat16; for Hopper GPUs. Blocks of a kv head, those that take longest first:

rotation     rotated queries in INT4, cut into bit planes (mosaic_rotation.py)
samples      exact logits of `SAMPLES` tokens -> where bins of scores begin
exact        log-sum-exp of the exact logits of sinks and window; zeros for what later kernels count in
centroids    scaled <q, c_k>, of 128 centroids each

Products but those of the rotation are made for 32 rows a warp at a time (mosaic_products.py). What all of it is to give
is `rabitq_jax.prepared_query.prepare_query_reference`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import _mosaic as m
from pallas_kernels.mosaic_bins import LOG2_E
from pallas_kernels.mosaic_parts import LOWEST
from pallas_kernels.mosaic_products import OCTET, load_chunks, products
from pallas_kernels.mosaic_rotation import TILE, WORD, Rotation, RotationSizes
from pallas_kernels.mosaic_samples import sampled_token
from pallas_kernels.mosaic_top_p_threshold import exp, warp_sum
from pallas_kernels.prepare_query import HEADROOM, SAMPLES, SHARP, padded_heads

WARPS, LANES = 4, 32
# Rows of which a warp, and a block, make products at a time.
WARP_ROWS = 32
BLOCK_ROWS = WARPS * WARP_ROWS
# Kinds of blocks but those of centroids.
KINDS = 3
LARGEST_GROUP, LARGEST_HEAD_DIM, CODE_WORDS = 16, 256, (2, 4, 8)
ZEROED = 2 * m.WARPGROUP


def takes(query, keys, rotation) -> bool:
    """Whether the kernel takes queries [B,K,G,D], keys [B,K,T,D] and a rotation [32 W,D]."""
    group, head_dim = query.shape[2:]
    words = rotation.shape[0] // WORD
    return (
        query.dtype == keys.dtype == jnp.bfloat16
        and group <= LARGEST_GROUP
        and head_dim % TILE == 0
        and head_dim <= LARGEST_HEAD_DIM
        and words in CODE_WORDS
    )


def prepare_query(
    query, keys, rotation, query_centroid, centroids, seed, layer, quantized, length,
    *, sink: int, softmax_scale: float, scope_all: bool, noise_gains: tuple[float, float], zeros: int,
):  # fmt: skip
    """Arguments and results are those of `prepare_query.prepare_query`.

    Raises:
      NotImplementedError: `takes` is False.
    """
    words, count = rotation.shape[0] // WORD, centroids.shape[2]
    if not takes(query, keys, rotation):
        raise NotImplementedError(
            f"the kernel takes bfloat16, groups of up to {LARGEST_GROUP} heads, head dimensions that are multiples of "
            f"{TILE} up to {LARGEST_HEAD_DIM}, and codes of {CODE_WORDS} words, got queries {query.dtype} "
            f"{query.shape}, keys {keys.dtype} and {words} words"
        )
    batch, kv_heads, group, head_dim = query.shape
    heads = padded_heads(group)
    sizes = _Sizes(
        rows=batch * kv_heads, kv_heads=kv_heads, tokens=keys.shape[2], centroids=count, zeros=zeros, sink=sink,
        scope_all=scope_all, random=seed is not None, has_centroid=query_centroid is not None,
        rotation=RotationSizes(
            group=group, heads=heads, head_dim=head_dim, words=words, softmax_scale=softmax_scale,
            noise_gains=noise_gains,
        ),
    )  # fmt: skip
    optional = [] if query_centroid is None else [query_centroid]
    if seed is not None:
        optional += [seed, jnp.asarray(layer, jnp.int32)[None]]
    outputs = (
        ((heads, 4, words), jnp.int32), ((heads, 2), jnp.float32), ((heads,), jnp.float32), ((heads,), jnp.float32),
        ((heads, count), jnp.float32), ((heads,), jnp.float32), ((zeros,), jnp.int32),
    )  # fmt: skip
    return m.call(
        functools.partial(_kernel, sizes),
        name="prepare_query",
        out_type=tuple(jax.ShapeDtypeStruct((batch, kv_heads, *shape), dtype) for shape, dtype in outputs),
        blocks=sizes.rows * (KINDS + -(-count // BLOCK_ROWS)),
        shared_words=sizes.shared_words,
    )(query, keys, rotation, centroids, quantized, length, *optional)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    rows: int
    kv_heads: int
    tokens: int
    centroids: int
    zeros: int
    sink: int
    scope_all: bool
    random: bool
    has_centroid: bool
    rotation: RotationSizes

    @property
    def group(self) -> int:
        return self.rotation.group

    @property
    def heads(self) -> int:
        return self.rotation.heads

    @property
    def octets(self) -> int:
        return -(-self.group // OCTET)

    @property
    def shared_words(self) -> int:
        return max(self.rotation.shared_words, self.heads * SAMPLES)


def _kernel(sizes: _Sizes, query, keys, rotation, centroids, quantized, length, *rest):
    """query [R,G,D], keys [R,T,D], rotation [32 W,D], centroids [R,C,D], quantized and length [B], (query centroid
    [R,D],) (seed [2], layer [1]); planes [R,H,4,W], factors [R,H,2], noise and base [R,H], shift [R,H,C], exact
    log-sum-exp [R,H], zeros [R,Z]; shared memory: see `_Sizes`."""
    *optional, planes, factors, noise, base, shift, exact_lse, zeros, shared = rest
    query_centroid = optional[0] if sizes.has_centroid else None
    seed, layer = optional[-2:] if sizes.random else (None, None)
    kind = m.divide(m.block_index(), sizes.rows)
    row = m.subtract(m.block_index(), m.multiply(kind, sizes.rows))
    shared = m.shared_address(shared)

    def rotate():
        arrays = query, rotation, query_centroid, seed, layer
        Rotation(sizes.rotation, row, *arrays, shared).quantize(planes, factors, noise)

    def with_logits(body, *arrays):
        return lambda: body(_Logits(sizes, row, query), *arrays)

    kinds = [
        rotate,
        with_logits(_find_base, shared, keys, quantized, base),
        with_logits(_sum_exact, shared, keys, quantized, length, exact_lse, zeros),
    ]
    for i, run in enumerate(kinds):
        m.when(m.both(m.not_less(kind, i), m.less(kind, i + 1)), run)
    m.when(m.not_less(kind, KINDS), with_logits(_store_shift, m.subtract(kind, KINDS), centroids, shift))


class _Logits:
    """Scaled products of a row's query heads with rows of an array; those of heads that are not real are zero."""

    def __init__(self, sizes: _Sizes, row, query):
        self.sizes, self.row = sizes, row
        self.warp, self.lane = m.right(m.thread_index(), 5), m.bit_and(m.thread_index(), LANES - 1)
        self.g, self.t = m.right(self.lane, 2), m.bit_and(self.lane, 3)
        self.heads = [m.add(self.g, OCTET * i) for i in range(sizes.octets)]
        self._query = [self._load_query(query, head) for head in self.heads]

    def _load_query(self, query, head):
        group, head_dim = self.sizes.group, self.sizes.rotation.head_dim
        place = m.add(m.multiply(self.row, group), m.minimum_signed(head, group - 1))
        chunks, is_real = load_chunks(query, place, head_dim, self.t), m.less(head, group)
        return [[m.select(is_real, word, 0) for word in chunk] for chunk in chunks]

    def places(self, first):
        """Of the warp's 32 rows of a block's, from one on, this lane's in products: of each eight, that of g."""
        return [m.add(first, m.add(m.left(self.warp, 5), m.add(self.g, i))) for i in range(0, WARP_ROWS, OCTET)]

    def results(self, first):
        """The same of results: of each eight, those of 2 t and 2 t + 1."""
        lane = m.add(m.left(self.warp, 5), m.left(self.t, 1))
        return [[m.add(first, m.add(lane, i + j)) for j in range(2)] for i in range(0, WARP_ROWS, OCTET)]

    def of(self, ref, rows):
        """Of each eight heads, the logits at `results`, of the rows of an array [N,D] that are at `places`."""
        sizes = self.sizes.rotation
        # All are under way before any is waited for.
        chunks = [load_chunks(ref, row, sizes.head_dim, self.t, now=True) for row in rows]
        by_rows = [products("bfloat16", self._query, row) for row in chunks]
        return [
            [[m.multiply_float(x, sizes.softmax_scale) for x in pair] for pair in eight]
            for eight in zip(*by_rows, strict=True)
        ]


def _find_base(logits: _Logits, shared, keys, quantized, base):
    """Where bins begin: `prepare_query.likely_peak`."""
    assert SAMPLES == BLOCK_ROWS
    sizes, row = logits.sizes, logits.row
    quantized = m.load(m.address(quantized, m.divide(row, sizes.kv_heads)))[0]
    scored = m.maximum_signed(m.subtract(quantized, sizes.sink), 0)
    first = m.multiply(row, sizes.tokens)
    tokens = [sampled_token(i, scored, sink=sizes.sink, tokens=sizes.tokens) for i in logits.places(0)]
    samples = logits.of(keys, [m.add(first, token) for token in tokens])
    for head, pairs in zip(logits.heads, samples, strict=True):
        at = m.add(shared, m.left(m.multiply(head, SAMPLES), 2))
        for (place, _), pair in zip(logits.results(0), pairs, strict=True):
            store = functools.partial(m.store_shared, m.add(at, m.left(place, 2)), [m.as_int(x) for x in pair])
            m.when(m.less(head, sizes.heads), store)
    m.barrier()
    for first_head in range(0, sizes.heads, WARPS):
        head = m.add(logits.warp, first_head)
        at = m.add(shared, m.left(m.add(m.multiply(head, SAMPLES), m.left(logits.lane, 2)), 2))
        peak = _likely_peak([m.as_float(x) for x in m.load_shared(at, words=SAMPLES // LANES)], scored)
        place = m.address(base, m.add(m.multiply(row, sizes.heads), head))
        m.store(place, [m.as_int(peak)], where=m.less(logits.lane, 1))


def _likely_peak(mine, scored):
    """Of logits of which a lane has some, and so many tokens scored."""
    mine = [m.select(m.less_float(m.maximum(x, m.subtract_float(0.0, x)), float("inf")), x, 0.0) for x in mine]
    total = lambda numbers: warp_sum(functools.reduce(m.add_float, numbers), m.add_float)  # noqa: E731
    mean = m.multiply_float(total(mine), 1 / SAMPLES)
    centred = [m.subtract_float(x, mean) for x in mine]
    deviation = m.square_root(m.multiply_float(total([m.multiply_float(x, x) for x in centred]), 1 / SAMPLES))
    highest = warp_sum(functools.reduce(m.maximum, mine), m.maximum)
    log_n = _log(m.to_float(m.maximum_signed(scored, SAMPLES)))
    root = m.square_root(m.multiply_float(log_n, 2.0))
    less = m.multiply_float(m.add_float(_log(log_n), math.log(4 * math.pi)), m.reciprocal(m.multiply_float(root, 2.0)))
    typical = m.fma(m.subtract_float(root, less), deviation, mean)
    headroom = m.minimum(m.maximum(m.subtract_float(HEADROOM + SHARP, deviation), 0.0), HEADROOM)
    return m.add_float(m.maximum(typical, highest), headroom)


def _log(x):
    return m.multiply_float(m.log2(x), 1 / LOG2_E)


def _sum_exact(logits: _Logits, shared, keys, quantized, length, exact_lse, zeros):
    """The log-sum-exp of the tokens that have no scores, minus infinity where it is not wanted; and zeros."""
    sizes, row = logits.sizes, logits.row
    sequence = m.divide(row, sizes.kv_heads)
    quantized, length = (m.load(m.address(x, sequence))[0] for x in (quantized, length))
    window = m.maximum_signed(quantized, sizes.sink)
    sinks = m.minimum_signed(length, sizes.sink)
    count = m.add(sinks, m.maximum_signed(m.subtract(length, window), 0)) if sizes.scope_all else m.value(0)
    first = m.multiply(row, sizes.tokens)
    thread = m.left(m.thread_index(), 1)

    def clear(i, _):
        word = m.add(m.add(m.multiply(row, sizes.zeros), m.multiply(i, ZEROED)), thread)
        m.store(m.address(zeros, word), [m.value(0), m.value(0)])
        return []

    m.loop(sizes.zeros // ZEROED, [], clear)

    def token_of(place):
        place = m.minimum_signed(place, m.subtract(count, 1))
        return m.select(m.less(place, sinks), place, m.add(window, m.subtract(place, sinks)))

    def add(i, carried):
        begin = m.multiply(i, BLOCK_ROWS)
        some = logits.of(keys, [m.add(first, token_of(place)) for place in logits.places(begin)])
        is_real = [m.less(place, count) for pair in logits.results(begin) for place in pair]
        sums = []
        for pairs, (peak, total) in zip(some, zip(carried[::2], carried[1::2], strict=True), strict=True):
            mine = [x for pair in pairs for x in pair]
            highest = [m.select(is_one, x, LOWEST) for is_one, x in zip(is_real, mine, strict=True)]
            new_peak = functools.reduce(m.maximum, highest, peak)
            total = m.multiply_float(total, exp(m.subtract_float(peak, new_peak)))
            for is_one, x in zip(is_real, mine, strict=True):
                total = m.add_float(total, m.select(is_one, exp(m.subtract_float(x, new_peak)), 0.0))
            sums += [new_peak, total]
        return sums

    rounds = m.right(m.add(count, BLOCK_ROWS - 1), BLOCK_ROWS.bit_length() - 1)
    sums = m.loop(rounds, [m.value(LOWEST), m.value(0.0)] * sizes.octets, add)
    for head, peak, total in zip(logits.heads, sums[::2], sums[1::2], strict=True):
        for lanes in (1, 2):
            other = m.shuffle_xor(peak, lanes), m.shuffle_xor(total, lanes)
            peak, total = _add_sums([(peak, total), other])
        at = m.add(shared, m.left(m.add(m.left(head, 3), m.left(logits.warp, 1)), 2))
        store = functools.partial(m.store_shared, at, [m.as_int(peak), m.as_int(total)])
        m.when(m.both(m.less(head, sizes.heads), m.less(logits.t, 1)), store)
    m.barrier()

    def store_head():
        at = m.add(shared, m.left(m.thread_index(), 5))
        words = [m.as_float(x) for offset in (0, 16) for x in m.load_shared(at, words=4, offset=offset)]
        peak, total = _add_sums(list(zip(words[::2], words[1::2], strict=True)))
        place = m.address(exact_lse, m.add(m.multiply(row, sizes.heads), m.thread_index()))
        m.store(place, [m.as_int(m.add_float(peak, _log(total)))])

    m.when(m.less(m.thread_index(), sizes.heads), store_head)


def _add_sums(sums):
    """Pairs of peaks and totals in units of e^peak, as one."""
    peak = functools.reduce(m.maximum, [peak for peak, _ in sums])
    terms = [m.multiply_float(total, exp(m.subtract_float(one, peak))) for one, total in sums]
    return peak, functools.reduce(m.add_float, terms)


def _store_shift(logits: _Logits, some, centroids, shift):
    """Products with some of the row's centroids."""
    sizes, row = logits.sizes, logits.row
    begin, first = m.multiply(some, BLOCK_ROWS), m.multiply(row, sizes.centroids)
    nearest = [m.minimum_signed(place, sizes.centroids - 1) for place in logits.places(begin)]
    of_heads = logits.of(centroids, [m.add(first, place) for place in nearest])
    for head, pairs in zip(logits.heads, of_heads, strict=True):
        at = m.multiply(m.add(m.multiply(row, sizes.heads), head), sizes.centroids)
        for places, pair in zip(logits.results(begin), pairs, strict=True):
            for place, x in zip(places, pair, strict=True):
                is_real = m.both(m.less(head, sizes.heads), m.less(place, sizes.centroids))
                m.store(m.address(shift, m.add(at, place)), [m.as_int(x)], where=is_real)
