"""All that a decode step needs of its queries before they meet the codes, in one launch.

    program (kv head, 0)       rotate, round to INT4, cut into bit planes
    program (kv head, 1)       exact logits of a sample of tokens -> where bins of scores begin
    program (kv head, 2)       log-sum-exp of the exact logits of sinks and window
    program (kv head, 3)       zeros for what later kernels count in
    program (kv head, 4 ...)   scaled <q, c_k>, `CENTROIDS` of them each

Query heads are padded to a multiple of 4 and, in products, to 16 rows; those added are zero. For Hopper GPUs there is
mosaic_prepare_query.py, with the same results.
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
# Where logits deviate by more nats, bins must reach further down, and few tokens are near the largest score.
SHARP = 4.0
CENTROIDS = 64
ZEROED = 256
# Elements of the rotation that are multiplied at a time: what fits into shared memory.
ROTATION_PART = 16384
# Programs of a kv head before those for centroids.
PARTS = 4


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


def likely_peak(logits, quantized, sink: int):
    """Where the largest score is likely to be, from a sample: float32 [...], a little above, for the top of bins.

    It need not be right. Below the largest score, all tokens above it are kept; far above, bins are left unused.

    Args:
      logits: float32 [..., SAMPLES], at `sample_positions`.
      quantized: int32, of the leading shape or one that broadcasts to it.
    """
    logits = jnp.where(jnp.abs(logits) < jnp.inf, logits, 0.0)
    mean = jnp.sum(logits, axis=-1) * (1 / SAMPLES)
    centred = logits - mean[..., None]
    deviation = jnp.sqrt(jnp.sum(centred * centred, axis=-1) * (1 / SAMPLES))
    # The typical largest of n normal numbers, in deviations above their mean.
    log_n = jnp.log(jnp.maximum(quantized - sink, SAMPLES).astype(jnp.float32))
    root = jnp.sqrt(2 * log_n)
    typical = root - (jnp.log(log_n) + math.log(4 * math.pi)) / (2 * root)
    headroom = jnp.clip(HEADROOM + SHARP - deviation, 0.0, HEADROOM)
    return jnp.maximum(mean + typical * deviation, jnp.max(logits, axis=-1)) + headroom


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    sink: int
    softmax_scale: float
    scope_all: bool
    random: bool
    noise_gains: tuple[float, float]


def _kernel(*refs, sizes: _Sizes, has_centroid: bool):
    """seed [2], layer, quantized and length [], query [G,D], keys [T,D], rotation [32 W, D], centroids [C,D], query
    centroid [D] if there is one -> planes [H,4,W], factors [H,2], noise [H], base [H], shift [H,C], exact log-sum-exp
    [H], zeros [Z]."""
    seed_ref, layer_ref, quantized_ref, length_ref, query_ref, keys_ref, rotation_ref, centroids_ref = refs[:8]
    planes_ref, factors_ref, noise_ref, base_ref, shift_ref, lse_ref, zeros_ref = refs[-7:]
    query_centroid_ref = refs[8] if has_centroid else None
    row, part = pl.program_id(0), pl.program_id(1)
    head = jnp.arange(product_shape(*query_ref.shape)[0], dtype=jnp.int32)

    def store_heads(ref, x):
        _pallas.store_masked(ref, (head,), x, head < ref.shape[0])

    @pl.when(part == 0)
    def _():
        arrays = query_ref, rotation_ref, query_centroid_ref
        _quantize(sizes, row, seed_ref, layer_ref, *arrays, planes_ref, factors_ref, noise_ref)

    @pl.when(part == 1)
    def _():
        quantized = quantized_ref[...]
        token = sample_positions(quantized, sizes.sink, keys_ref.shape[0])
        logits = sizes.softmax_scale * _products(query_ref, keys_ref, token)
        store_heads(base_ref, likely_peak(logits, quantized, sizes.sink))

    @pl.when(part == 2)
    def _():
        lse = jnp.full(head.shape, -jnp.inf, jnp.float32)
        if sizes.scope_all:
            lse = logsumexp_of_exact_tokens(
                quantized_ref, length_ref, query_ref, keys_ref, sink=sizes.sink, softmax_scale=sizes.softmax_scale
            )
        store_heads(lse_ref, lse)

    @pl.when(part == 3)
    def _():
        def clear(i, _):
            zeros_ref[pl.ds(i * ZEROED, ZEROED)] = jnp.zeros((ZEROED,), jnp.int32)

        jax.lax.fori_loop(0, zeros_ref.shape[0] // ZEROED, clear, None)

    @pl.when(part >= PARTS)
    def _():
        centroid = (part - PARTS) * CENTROIDS + jnp.arange(CENTROIDS, dtype=jnp.int32)
        shift = sizes.softmax_scale * _products(query_ref, centroids_ref, centroid)
        row = jax.lax.broadcasted_iota(jnp.int32, shift.shape, 0)
        column = centroid[None, :] + 0 * row
        real = (row < shift_ref.shape[0]) & (column < shift_ref.shape[1])
        _pallas.store_masked(shift_ref, (row, column), shift, real)


def _products(query_ref, rows_ref, index):
    """Products of the queries with rows of an array [N,D], of those in range: float32 [M, n]."""
    # Products of two bfloat16 are exact in float32.
    dtype = jnp.bfloat16 if query_ref.dtype == rows_ref.dtype == jnp.bfloat16 else jnp.float32
    query = load_query(query_ref, dtype)
    dim = jax.lax.broadcasted_iota(jnp.int32, (index.shape[0], query.shape[1]), 1)
    row = index[:, None] + 0 * dim
    rows = _pallas.load_masked(rows_ref, (row, dim), (row < rows_ref.shape[0]) & (dim < query_ref.shape[1]))
    return _pallas.dot(query, rows.astype(dtype).T)


def _quantize(
    sizes: _Sizes, row, seed_ref, layer_ref, query_ref, rotation_ref, query_centroid_ref, planes_ref, factors_ref,
    noise_ref,
):  # fmt: skip
    (group, head_dim), (heads, _, words) = query_ref.shape, planes_ref.shape
    rows, columns = product_shape(group, head_dim)
    # Products have 16 rows or more. Heads are spread over them, so that what follows can be gathered to fewer rows.
    kept_rows = _pallas.power_of_two(heads)
    spread = rows // kept_rows
    query = _centred_query(query_ref, query_centroid_ref, rows, columns, spread)

    # A power of two of words at a time; words past the end are zero.
    part_words = min(_pallas.power_of_two(words), max(1, ROTATION_PART // columns // 32))
    parts = range(0, words, part_words)
    size = 32 * part_words
    code_row = jax.lax.broadcasted_iota(jnp.int32, (size, columns), 0)
    code_dim = jax.lax.broadcasted_iota(jnp.int32, (size, columns), 1)

    def rotate(word):
        code = 32 * word + code_row
        valid = (code < 32 * words) & (code_dim < head_dim)
        rotated = _pallas.dot_wide(query, _pallas.load_masked(rotation_ref, (code, code_dim), valid).T)
        return rotated if spread == 1 else jnp.sum(rotated.reshape(kept_rows, spread, size), axis=1)

    rotated = [rotate(word) for word in parts]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(y), axis=1) for y in rotated])
    step = largest / QUERY_LEVEL
    inverse = 1 / jnp.where(step == 0, 1.0, step)

    head = jax.lax.broadcasted_iota(jnp.int32, (kept_rows, size), 0)
    code = jax.lax.broadcasted_iota(jnp.int32, (kept_rows, size), 1)
    word_head = jax.lax.broadcasted_iota(jnp.int32, (kept_rows, part_words), 0)
    word_place = jax.lax.broadcasted_iota(jnp.int32, (kept_rows, part_words), 1)
    sums = jnp.zeros((kept_rows,), jnp.int32)
    for word, y in zip(parts, rotated, strict=True):
        noise = 0.5
        if sizes.random:
            counter = (row * group + head) * (32 * words) + 32 * word + code
            seed = (seed_ref[0], seed_ref[1])
            noise = threefry.uniform(seed, jax.lax.bitcast_convert_type(counter, jnp.uint32), layer_ref[...])
        level = jnp.floor(y * inverse[:, None] + noise)
        level = jnp.minimum(level, float(QUERY_LEVEL)).astype(jnp.int32)
        sums += jnp.sum(level, axis=1)
        for plane in range(4):
            ones = ((level >> plane) & 1) << (code % 32)
            packed = jnp.sum(ones.reshape(kept_rows, part_words, 32), axis=2)
            place = (word_head, plane + 0 * word_head, word + word_place)
            _pallas.store_masked(planes_ref, place, packed, (word_head < heads) & (word + word_place < words))

    norm2 = jnp.sum(jnp.square(query.astype(jnp.float32)), axis=1)
    norm2 = norm2 if spread == 1 else jnp.sum(norm2.reshape(kept_rows, spread), axis=1)
    of_norm, of_step = sizes.noise_gains
    one_head = jnp.arange(kept_rows, dtype=jnp.int32)
    _pallas.store_masked(noise_ref, (one_head,), jnp.sqrt(of_norm * norm2 + of_step * step * step), one_head < heads)
    for i, factor in enumerate((step * sizes.softmax_scale, -sums.astype(jnp.float32))):
        _pallas.store_masked(factors_ref, (one_head, i + 0 * one_head), factor, one_head < heads)


def _centred_query(query_ref, query_centroid_ref, rows: int, columns: int, spread: int):
    """q - c_q, head h in row h * spread, zeros elsewhere: the queries' own dtype if there is no c_q, else float32."""
    group, head_dim = query_ref.shape
    row, dim = (jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))
    head = row // spread
    real = (head * spread == row) & (head < group) & (dim < head_dim)
    query = _pallas.load_masked(query_ref, (head, dim), real)
    if query_centroid_ref is None:
        return query
    each = jnp.arange(columns, dtype=jnp.int32)
    centroid = _pallas.load_masked(query_centroid_ref, (each,), each < head_dim)
    return jnp.where(real, query.astype(jnp.float32) - centroid[None, :], 0.0)


def prepare_query(
    query, keys, rotation, query_centroid, centroids, seed, layer, quantized, length,
    *, sink: int, softmax_scale: float, scope_all: bool, noise_gains: tuple[float, float], zeros: int,
):  # fmt: skip
    """`rabitq_jax.prepared_query.prepare_query_reference`, and zeros for later kernels to count in.

    Args:
      query: [B,K,G,D].
      keys: [B,K,T,D].
      rotation: float32 [32 W, D]; query_centroid: float32 [B,K,D] or None.
      centroids: bfloat16 [B,K,C,D], of the keys.
      seed: uint32 [2], or None for rounding to nearest.
      layer: int32 [], tells random numbers of one seed apart.
      quantized, length: int32 [B].
      scope_all: the log-sum-exp is wanted; else it is -inf.
      noise_gains: of `rabitq_jax.error_model.noise_gains`.
      zeros: how many a kv head, a multiple of 256.

    Returns:
      planes int32 [B,K,H,4,W], factors float32 [B,K,H,2], noise and base float32 [B,K,H], shift float32 [B,K,H,C],
      log-sum-exp float32 [B,K,H], zeros int32 [B,K,Z]; H is `padded_heads(G)`.
    """
    batch, kv_heads, group, _ = query.shape
    words, count = rotation.shape[0] // 32, centroids.shape[2]
    heads = padded_heads(group)
    sizes = _Sizes(
        sink=sink, softmax_scale=softmax_scale, scope_all=scope_all, random=seed is not None, noise_gains=noise_gains
    )
    per_sequence = _pallas.per_sequence(kv_heads)
    head = functools.partial(_pallas.per_head, kv_heads=kv_heads)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda row, i: (0,) * array.ndim)

    by_head = [centroids] + ([] if query_centroid is None else [query_centroid])
    seed = jnp.zeros((2,), jnp.uint32) if seed is None else seed
    layer = jnp.asarray(layer, jnp.int32)
    out_shape = [
        jax.ShapeDtypeStruct((batch, kv_heads, *shape), dtype)
        for shape, dtype in (
            ((heads, 4, words), jnp.int32),
            ((heads, 2), jnp.float32),
            ((heads,), jnp.float32),
            ((heads,), jnp.float32),
            ((heads, count), jnp.float32),
            ((heads,), jnp.float32),
            ((zeros,), jnp.int32),
        )
    ]
    return _pallas.call(
        functools.partial(_kernel, sizes=sizes, has_centroid=query_centroid is not None),
        name="prepare_query",
        grid=(batch * kv_heads, PARTS + pl.cdiv(count, CENTROIDS)),
        in_specs=[whole(seed), whole(layer), per_sequence, per_sequence, head(query), head(keys), whole(rotation)]
        + [head(x) for x in by_head],
        out_specs=[head(x) for x in out_shape],
        out_shape=out_shape,
    )(seed, layer, quantized, length, query, keys, rotation, *by_head)
