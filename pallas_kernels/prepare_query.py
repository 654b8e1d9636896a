"""All that a decode step needs of its queries before they meet the codes, in one launch.

    program (kv head, 0)       rotate, round to INT4, cut into bit planes; score a sample of tokens, for the top of bins
    program (kv head, 1)       log-sum-exp of the exact logits of sinks and window
    program (kv head, 2)       zeros for what later kernels count in
    program (kv head, 3 ...)   scaled <q, c_k>, `CENTROIDS` of them each

Query heads are padded to a multiple of 4 and, in products, to 16 rows; those added are zero.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _pallas, threefry
from pallas_kernels.exact_logsumexp import logsumexp_of_exact_tokens
from pallas_kernels.gathered_attention import load_query, product_shape

QUERY_LEVEL = 7
SAMPLES = 128
# A threshold lies up to some 17 nats below the largest score, of 32 that bins cover: rather too high than too low.
HEADROOM = 8.0
CENTROIDS = 64
ZEROED = 256


def padded_heads(group: int) -> int:
    """Query heads of a kv head in what the kernel gives."""
    return -(-group // 4) * 4


def sample_positions(quantized, sink: int, tokens: int):
    """int32 [..., SAMPLES], tokens spread evenly over [sink, quantized); quantized is int32 [..., 1]."""
    i = jnp.arange(SAMPLES, dtype=jnp.int32)
    scored = jnp.maximum(quantized - sink, 0)
    # In whole SAMPLES and the rest, so that no product overflows.
    place = scored // SAMPLES * i + scored % SAMPLES * i // SAMPLES
    return jnp.minimum(sink + place, tokens - 1)


def likely_peak(scores, quantized, sink: int):
    """Where the largest score is likely to be, from a sample: float32 [...], a little above, for the top of bins.

    It need not be right. Below the largest score, all tokens above it are kept; far above, bins are left unused.

    Args:
      scores: float32 [..., SAMPLES], at `sample_positions`.
      quantized: int32, of the leading shape or one that broadcasts to it.
    """
    scores = jnp.where(jnp.abs(scores) < jnp.inf, scores, 0.0)
    mean = jnp.sum(scores, axis=-1) * (1 / SAMPLES)
    centred = scores - mean[..., None]
    deviation = jnp.sqrt(jnp.sum(centred * centred, axis=-1) * (1 / SAMPLES))
    # The typical largest of n normal numbers, in deviations above their mean.
    log_n = jnp.log(jnp.maximum(quantized - sink, SAMPLES).astype(jnp.float32))
    root = jnp.sqrt(2 * log_n)
    typical = root - (jnp.log(log_n) + math.log(4 * math.pi)) / (2 * root)
    return jnp.maximum(mean + typical * deviation, jnp.max(scores, axis=-1)) + HEADROOM


def _kernel(*refs, sizes):
    """seed [2], quantized and length [], query [G,D], keys [T,D], rotation [32 W, D], bits [T,W], scale [T], centroids
    [C,D], and with a query centroid, that [D] and bias [T] -> planes [H,4,W], factors [H,3], shift [H,C], exact
    log-sum-exp [H], zeros [Z]."""
    (*inputs, planes_ref, factors_ref, shift_ref, lse_ref, zeros_ref) = refs
    seed_ref, quantized_ref, length_ref, query_ref, keys_ref, rotation_ref, bits_ref, scale_ref, centroids_ref = inputs[
        :9
    ]
    row, part = pl.program_id(0), pl.program_id(1)

    @pl.when(part == 0)
    def _():
        _quantize(sizes, row, seed_ref, quantized_ref, query_ref, rotation_ref, bits_ref, scale_ref, centroids_ref,
                  *inputs[9:], planes_ref=planes_ref, factors_ref=factors_ref)  # fmt: skip

    @pl.when(part == 1)
    def _():
        head = jnp.arange(product_shape(*query_ref.shape)[0], dtype=jnp.int32)
        if sizes.scope_all:
            lse = logsumexp_of_exact_tokens(
                quantized_ref, length_ref, query_ref, keys_ref, sink=sizes.sink, softmax_scale=sizes.softmax_scale
            )
        else:
            lse = jnp.full(head.shape, -jnp.inf, jnp.float32)
        _pallas.store_masked(lse_ref, (head,), lse, head < lse_ref.shape[0])

    @pl.when(part == 2)
    def _():
        def clear(i, _):
            zeros_ref[pl.ds(i * ZEROED, ZEROED)] = jnp.zeros((ZEROED,), jnp.int32)

        jax.lax.fori_loop(0, zeros_ref.shape[0] // ZEROED, clear, None)

    @pl.when(part > 2)
    def _():
        centroid = (part - 3) * CENTROIDS + jnp.arange(CENTROIDS, dtype=jnp.int32)
        shift = _shift(query_ref, centroids_ref, centroid, sizes.softmax_scale)
        head = jax.lax.broadcasted_iota(jnp.int32, shift.shape, 0)
        centroid = centroid[None, :] + 0 * head
        real = (head < shift_ref.shape[0]) & (centroid < shift_ref.shape[1])
        _pallas.store_masked(shift_ref, (head, centroid), shift, real)


def _shift(query_ref, centroids_ref, centroid, softmax_scale):
    """Scaled products of the queries with rows of the centroids: float32 [M, n]."""
    # Products of two bfloat16 are exact in float32.
    dtype = jnp.bfloat16 if query_ref.dtype == jnp.bfloat16 else jnp.float32
    query = load_query(query_ref, dtype)
    head_dim = query_ref.shape[1]
    dim = jax.lax.broadcasted_iota(jnp.int32, (centroid.shape[0], query.shape[1]), 1)
    row = centroid[:, None] + 0 * dim
    rows = _pallas.load_masked(centroids_ref, (row, dim), (row < centroids_ref.shape[0]) & (dim < head_dim))
    return softmax_scale * _pallas.dot(query, rows.astype(dtype).T)


def _quantize(
    sizes, row, seed_ref, quantized_ref, query_ref, rotation_ref, bits_ref, scale_ref, centroids_ref,
    query_centroid_ref=None, bias_ref=None, *, planes_ref, factors_ref,
):  # fmt: skip
    head_dim, (heads, _, words) = query_ref.shape[1], planes_ref.shape
    query = load_query(query_ref, jnp.float32)
    rows, columns = query.shape
    if query_centroid_ref is not None:
        dim = jnp.arange(columns, dtype=jnp.int32)
        centred = query - _pallas.load_masked(query_centroid_ref, (dim,), dim < head_dim)[None, :]
        # Rows that are padding stay zero.
        query = jnp.where(jax.lax.broadcasted_iota(jnp.int32, query.shape, 0) < query_ref.shape[0], centred, 0.0)

    word_row = jax.lax.broadcasted_iota(jnp.int32, (32, columns), 0)
    word_dim = jax.lax.broadcasted_iota(jnp.int32, (32, columns), 1)
    rotated = []
    for w in range(words):
        rotation = _pallas.load_masked(rotation_ref, (32 * w + word_row, word_dim), word_dim < head_dim)
        rotated.append(_pallas.dot(query, rotation.T))
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(y), axis=1) for y in rotated])
    step = largest / QUERY_LEVEL

    head = jax.lax.broadcasted_iota(jnp.int32, (rows, 32), 0)
    bit = jax.lax.broadcasted_iota(jnp.int32, (rows, 32), 1)
    group = query_ref.shape[0]
    seed = (seed_ref[0], seed_ref[1]) if sizes.random else None
    one_head = jnp.arange(rows, dtype=jnp.int32)
    sums = jnp.zeros((rows,), jnp.int32)
    levels = []
    for w in range(words):
        noise = 0.5
        if seed is not None:
            counter = ((row * group + head) * words + w) * 32 + bit
            noise = threefry.uniform(seed, jax.lax.bitcast_convert_type(counter, jnp.uint32))
        ratio = rotated[w] / jnp.where(step == 0, 1.0, step)[:, None]
        level = jnp.minimum(jnp.floor(ratio + noise), float(QUERY_LEVEL)).astype(jnp.int32)
        levels.append(level)
        sums += jnp.sum(level, axis=1)
        for plane in range(4):
            word = jnp.sum(((level >> plane) & 1) << bit, axis=1)
            place = (one_head, plane + 0 * one_head, w + 0 * one_head)
            _pallas.store_masked(planes_ref, place, word, one_head < heads)

    gain = step * sizes.softmax_scale
    quantized = quantized_ref[...]
    token = sample_positions(quantized, sizes.sink, bits_ref.shape[0])
    dots = jnp.zeros((rows, SAMPLES), jnp.float32)
    sample_bit = jax.lax.broadcasted_iota(jnp.int32, (32, SAMPLES), 0)
    for w in range(words):
        word = bits_ref[token, w]
        signs = 2 * ((word[None, :] >> sample_bit) & 1) - 1
        dots += _pallas.dot(levels[w].astype(jnp.bfloat16), signs.astype(jnp.bfloat16))
    scores = dots * gain[:, None] * scale_ref[token].astype(jnp.float32)[None, :]
    if bias_ref is not None:
        scores += sizes.softmax_scale * bias_ref[token].astype(jnp.float32)[None, :]
    tokens_per_centroid = bits_ref.shape[0] // centroids_ref.shape[0]
    scores += _shift(query_ref, centroids_ref, token // tokens_per_centroid, sizes.softmax_scale)
    base = likely_peak(scores, quantized, sizes.sink)
    for i, factor in enumerate((gain, -sums.astype(jnp.float32), base)):
        _pallas.store_masked(factors_ref, (one_head, i + 0 * one_head), factor, one_head < heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    sink: int
    softmax_scale: float
    scope_all: bool
    random: bool


def prepare_query(
    query, keys, rotation, query_centroid, bits, scale, bias, centroids, seed, quantized, length,
    *, sink: int, softmax_scale: float, scope_all: bool, zeros: int,
):  # fmt: skip
    """`rabitq_jax.prepared_query.prepare_query_reference`, and zeros for later kernels to count in.

    Args:
      query: [B,K,G,D].
      keys: [B,K,T,D].
      rotation: float32 [32 W, D]; query_centroid: float32 [B,K,D] or None.
      bits, scale, bias, centroids: of the key codes; bias is None where query_centroid is.
      seed: uint32 [2], or None for rounding to nearest.
      quantized, length: int32 [B].
      scope_all: the log-sum-exp is wanted; else it is -inf.
      zeros: how many a kv head, a multiple of 256.

    Returns:
      planes int32 [B,K,H,4,W], factors float32 [B,K,H,3], shift float32 [B,K,H,C], log-sum-exp float32 [B,K,H], zeros
      int32 [B,K,Z]; H is `padded_heads(G)`.
    """
    batch, kv_heads, group, _ = query.shape
    words, count = bits.shape[-1], centroids.shape[2]
    heads = padded_heads(group)
    sizes = _Sizes(sink=sink, softmax_scale=softmax_scale, scope_all=scope_all, random=seed is not None)
    per_sequence = pl.BlockSpec((None,), lambda row, i: (row // kv_heads,))

    def whole(array):
        return pl.BlockSpec(array.shape, lambda row, i: (0,) * array.ndim)

    def head(array):
        shape = array.shape[2:]
        return pl.BlockSpec((None, None, *shape), lambda row, i: (row // kv_heads, row % kv_heads, *(0,) * len(shape)))

    # Integer operations lower for int32 alone.
    by_head = [jax.lax.bitcast_convert_type(bits, jnp.int32), scale, centroids]
    by_head += [] if query_centroid is None else [query_centroid, bias]
    seed = jnp.zeros((2,), jnp.uint32) if seed is None else seed
    out_shape = [
        jax.ShapeDtypeStruct((batch, kv_heads, *shape), dtype)
        for shape, dtype in (
            ((heads, 4, words), jnp.int32),
            ((heads, 3), jnp.float32),
            ((heads, count), jnp.float32),
            ((heads,), jnp.float32),
            ((zeros,), jnp.int32),
        )
    ]
    return _pallas.call(
        functools.partial(_kernel, sizes=sizes),
        name="prepare_query",
        grid=(batch * kv_heads, 3 + pl.cdiv(count, CENTROIDS)),
        in_specs=[whole(seed), per_sequence, per_sequence, head(query), head(keys), whole(rotation)]
        + [head(x) for x in by_head],
        out_specs=[head(x) for x in out_shape],
        out_shape=out_shape,
    )(seed, quantized, length, query, keys, rotation, *by_head)
