"""Prefill and decode against dense attention in float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabitq_jax import RaBitQConfig, attention
from rabitq_jax.cache import Cache, init_layer_cache, layer_rotation_key

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 6, 2, 20, 512
PROMPT = np.array([150, 60, 7])
SMALL = dict(sink=4, recent=16, interval=32)

decode = jax.jit(attention.decode, static_argnames=("config",))
prefill = jax.jit(attention.prefill, static_argnames=("config", "fresh", "last"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def prompt(seed=0, tokens=150, batch=3):
    """query [B,N,H,D], key and value [B,N,K,D]; keys have a mean, so that centroids matter."""
    return (
        normal(seed, batch, tokens, HEADS, HEAD_DIM) + 0.3,
        normal(seed + 1, batch, tokens, KV_HEADS, HEAD_DIM) + 0.5,
        normal(seed + 2, batch, tokens, KV_HEADS, HEAD_DIM),
    )


def empty_cache(config, batch=3):
    return init_layer_cache(batch, CAPACITY, KV_HEADS, HEAD_DIM, config, dtype=jnp.float32)


def filled_cache(config, seed=0, lengths=PROMPT):
    return prefill(*prompt(seed, batch=len(lengths)), empty_cache(config, len(lengths)), config, new_tokens=lengths)[1]


def dense(query, keys, values):
    """Attention of one token, float64: query [H,D], keys and values [T,K,D] -> [H,D]."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out = []
    for head in range(HEADS):
        kv_head = head * KV_HEADS // HEADS
        logits = keys[:, kv_head] @ query[head] / HEAD_DIM**0.5
        weights = np.exp(logits - logits.max())
        out.append(weights @ values[:, kv_head] / weights.sum())
    return np.stack(out)


@functools.partial(jax.jit, static_argnames=("config",))
def decode_tokens(tokens, cache, config):
    """Feed N tokens (query, key, value: [N,B,...]); all outputs, the last cache, and all steps' stats."""

    def step(cache, token):
        index, *arrays = token
        out, cache, stats = attention.decode(*arrays, cache, config, prng_key=jax.random.key(index))
        return cache, (out, stats, cache.quantized)

    cache, (out, stats, quantized) = jax.lax.scan(step, cache, (jnp.arange(len(tokens[0])), *tokens))
    return out, cache, stats, quantized


CENTROIDS = [(k, q) for k in ("block", "prompt") for q in ("none", "prompt")]


@pytest.mark.parametrize("key_centroid,query_centroid", CENTROIDS)
def test_decode_at_p_one_is_dense_attention(key_centroid, query_centroid):
    """Ragged batch; 200 steps, over which every sequence quantizes six blocks."""
    config = RaBitQConfig(top_p=1.0, key_centroid=key_centroid, query_centroid=query_centroid, **SMALL)
    _, key, value = prompt()
    new_query, new_key, new_value = (x.swapaxes(0, 1) for x in prompt(seed=3, tokens=200))
    out, _, stats, quantized = decode_tokens((new_query, new_key, new_value), filled_cache(config), config)
    for b, held in enumerate(PROMPT):
        keys = np.concatenate([key[b, :held], new_key[:, b]])
        values = np.concatenate([value[b, :held], new_value[:, b]])
        for n in range(200):
            expected = dense(new_query[n, b], keys[: held + n + 1], values[: held + n + 1])
            np.testing.assert_allclose(out[n, b], expected, atol=1e-5)
        assert len(np.unique(quantized[:, b])) >= 6
    np.testing.assert_array_equal(stats.kept, np.broadcast_to(stats.length[..., None], stats.kept.shape))
    assert np.all(stats.mass == 1)


def test_a_dense_layer_is_dense_attention():
    new_query, new_key, new_value = (x[:, 0] for x in prompt(seed=3, tokens=1))
    _, key, value = prompt()
    out, cache, stats = decode(new_query, new_key, new_value, filled_cache(None), None)
    for b, held in enumerate(PROMPT):
        keys = np.concatenate([key[b, :held], new_key[b : b + 1]])
        values = np.concatenate([value[b, :held], new_value[b : b + 1]])
        np.testing.assert_allclose(out[b], dense(new_query[b], keys, values), atol=1e-5)
    assert cache.length.tolist() == (PROMPT + 1).tolist()
    np.testing.assert_array_equal(stats.bytes_read, stats.bytes_dense)


def test_small_p_reads_fewer_tokens_and_stays_close():
    """Three keys of every kv head point along its queries: nearly all of the mass is there, and Top-p finds them."""
    config = RaBitQConfig(top_p=0.99, **SMALL)
    query, key, value = prompt(tokens=400, batch=1)
    new_query, new_key, new_value = (x[:, 0] for x in prompt(seed=3, tokens=1, batch=1))
    direction = 4 * new_key
    new_query = np.repeat(direction, HEADS // KV_HEADS, axis=1)
    key[:, [50, 200, 301]] = direction[:, None]
    _, cache = prefill(query, key, value, empty_cache(config, 1), config)
    out, _, stats = decode(new_query, new_key, new_value, cache, config, prng_key=jax.random.key(0))
    keys, values = np.concatenate([key[0], new_key]), np.concatenate([value[0], new_value])
    sinks_and_window = 4 + 401 - 384
    assert np.all(stats.kept >= sinks_and_window + 3) and np.all(stats.kept < 100)
    assert np.all(stats.mass >= 0.99)
    np.testing.assert_allclose(out[0], dense(new_query[0], keys, values), atol=0.02)


@pytest.mark.parametrize("key_centroid,query_centroid", CENTROIDS)
def test_prefill_is_causal_attention_in_one_chunk_or_in_many(key_centroid, query_centroid):
    config = RaBitQConfig(key_centroid=key_centroid, query_centroid=query_centroid, **SMALL)
    arrays = query, key, value = prompt()
    whole, one = prefill(*arrays, empty_cache(config), config, new_tokens=PROMPT, fresh=True)
    cache, parts = empty_cache(config), []
    for start in range(0, 150, 50):
        chunk = (x[:, start : start + 50] for x in arrays)
        new_tokens = np.clip(PROMPT - start, 0, 50)
        out, cache = prefill(*chunk, cache, config, new_tokens=new_tokens, last=start == 100)
        parts.append(out)
    for b, held in enumerate(PROMPT):
        for n in range(held):
            expected = dense(query[b, n], key[b, : n + 1], value[b, : n + 1])
            np.testing.assert_allclose(whole[b, n], expected, atol=1e-5)
            np.testing.assert_allclose(parts[n // 50][b, n % 50], expected, atol=1e-5)
    assert cache.length.tolist() == PROMPT.tolist() and cache.quantized.tolist() == [128, 32, 0]
    assert_equal_codes(one, cache, exact=query_centroid == "none")


def assert_equal_codes(one, other, *, exact=True):
    """Codes of the quantized tokens and blocks are the same bits, or, for a mean in another order, close."""
    assert one.quantized.tolist() == other.quantized.tolist()
    for b, quantized in enumerate(one.quantized):
        for name in ("bits", "scale", "bias"):
            if (array := getattr(one.codes, name)) is not None:
                held = [np.asarray(x[b, :, :quantized], np.float32) for x in (array, getattr(other.codes, name))]
                np.testing.assert_allclose(*held, rtol=0 if exact else 2**-7, atol=0 if exact else 1e-3)
        centroids = -(-int(quantized) // one.codes.tokens_per_centroid)
        held = [np.asarray(x.codes.key_centroids[b, :, :centroids], np.float32) for x in (one, other)]
        np.testing.assert_array_equal(*held)


def test_codes_are_a_function_of_the_keys():
    """With block centroids it does not matter whether a token came with the prompt or was generated."""
    config = RaBitQConfig(**SMALL)
    arrays = prompt(tokens=150)
    lengths = np.array([150, 120, 110])
    _, at_once = prefill(*arrays, empty_cache(config), config, new_tokens=lengths)
    _, cache = prefill(*(x[:, :100] for x in arrays), empty_cache(config), config)
    for n in range(100, 150):
        token = (x[:, n] for x in arrays)
        _, cache, _ = decode(*token, cache, config, prng_key=jax.random.key(n), active=jnp.asarray(n < lengths))
    assert_equal_codes(at_once, cache)


@pytest.mark.parametrize("key_centroid", ["block", "prompt", "none"])
def test_codes_can_be_added_to_a_dense_cache(key_centroid):
    config = RaBitQConfig(**SMALL, key_centroid=key_centroid, rotation_seed=3, dense_layers=1)
    layer = filled_cache(None)
    cache = attention.add_codes(Cache(layers=(layer, layer), rotation_seed=jnp.uint32(0)), config)
    assert cache.layers[0].codes is None and int(cache.rotation_seed) == 3
    empty = init_layer_cache(
        3, CAPACITY, KV_HEADS, HEAD_DIM, config, dtype=jnp.float32, rotation_key=layer_rotation_key(3, 1)
    )
    _, want = prefill(*prompt(), empty, config, new_tokens=PROMPT)
    assert jax.tree.structure(cache.layers[1]) == jax.tree.structure(want)
    for (path, got), expected in zip(jax.tree.leaves_with_path(cache.layers[1]), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=jax.tree_util.keystr(path))


def test_codes_cannot_be_added_twice_or_without_queries():
    cache = Cache(layers=(filled_cache(None),), rotation_seed=jnp.uint32(0))
    with pytest.raises(ValueError, match="query_centroid 'prompt' needs the prompt's queries"):
        attention.add_codes(cache, RaBitQConfig(query_centroid="prompt"))
    with pytest.raises(ValueError, match="multiple of interval 96, got 512"):
        attention.add_codes(cache, RaBitQConfig(interval=96, dense_layers=0))
    with pytest.raises(ValueError, match="cache has codes already"):
        attention.add_codes(attention.add_codes(cache, RaBitQConfig(dense_layers=0)), RaBitQConfig(dense_layers=0))


def test_a_second_prompt_continues_the_first():
    config = RaBitQConfig(top_p=1.0, **SMALL)
    query, key, value = prompt(tokens=260)
    first, second = np.array([90, 150, 8]), np.array([100, 3, 110])
    cache = empty_cache(config)
    _, cache = prefill(*(x[:, :150] for x in (query, key, value)), cache, config, new_tokens=first)
    rows = np.arange(3)
    out, cache, _ = decode(*(x[rows, first] for x in (query, key, value)), cache, config, prng_key=jax.random.key(0))
    columns = first[:, None] + 1 + np.arange(110)
    chunk = (x[rows[:, None], np.minimum(columns, 259)] for x in (query, key, value))
    out, cache = prefill(*chunk, cache, config, new_tokens=second)
    for b in range(3):
        for n in range(second[b]):
            held = first[b] + 2 + n
            np.testing.assert_allclose(out[b, n], dense(query[b, held - 1], key[b, :held], value[b, :held]), atol=1e-5)
    assert cache.length.tolist() == (first + 1 + second).tolist()
    assert cache.quantized.tolist() == config.quantized_length(first + 1 + second).tolist()


def test_a_sequence_that_is_not_active_keeps_its_cache():
    config = RaBitQConfig(**SMALL)
    cache = filled_cache(config)
    token = (x[:, 0] for x in prompt(seed=3, tokens=1))
    active = jnp.array([True, False, True])
    _, new, _ = decode(*token, cache, config, prng_key=jax.random.key(0), active=active)
    assert new.length.tolist() == (PROMPT + [1, 0, 1]).tolist()
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(new), strict=True):
        if before.shape[0] == 3:
            np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.parametrize("selection", ["plain", "debiased"])
def test_layers_round_independently(selection):
    """Estimated masses follow the rounding of the queries."""
    config = RaBitQConfig(top_p=0.5, selection=selection, **SMALL)
    cache = filled_cache(config, lengths=np.array([150, 120]))
    token = [x[:, 0] for x in prompt(seed=5, tokens=1, batch=2)]
    one, again, other = (
        decode(*token, cache, config, prng_key=jax.random.key(0), layer=layer)[2].mass for layer in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.all(one != other)


def test_quantized_length_follows_the_length():
    config = RaBitQConfig(**SMALL)
    tokens = [x.swapaxes(0, 1) for x in prompt(seed=3, tokens=120)]
    _, _, stats, quantized = decode_tokens(tokens, filled_cache(config), config)
    np.testing.assert_array_equal(stats.length, PROMPT + 1 + np.arange(120)[:, None])
    np.testing.assert_array_equal(quantized, config.quantized_length(np.asarray(stats.length)))


@pytest.mark.parametrize("scope", ["all", "scored"])
@pytest.mark.parametrize("query_centroid,bytes_per_code", [("none", 6), ("prompt", 8)])
def test_bytes_read(scope, query_centroid, bytes_per_code):
    """float32 cache, 20 dimensions in one word: a key has 80 bytes, a code 4 of bits, 2 of scale and 2 of bias."""
    config = RaBitQConfig(top_p=0.4, top_p_scope=scope, query_centroid=query_centroid, **SMALL)
    token = (x[:, 0] for x in prompt(seed=3, tokens=1))
    _, _, stats = decode(*token, filled_cache(config), config, prng_key=jax.random.key(0))
    assert stats.length.tolist() == [151, 61, 8]
    for b, (length, quantized) in enumerate([(151, 128), (61, 32), (8, 0)]):
        centroids = quantized // 32 * 20 * 2
        exact = length - max(quantized - 4, 0)
        expected = 2 * (quantized * bytes_per_code + centroids) + int(stats.kept[b].sum()) * 160
        if scope == "all":
            expected += 2 * exact * 80
        assert stats.bytes_read[b] == expected
        assert stats.bytes_dense[b] == length * 2 * 160
        # Each head's tokens, and no more than their union.
        scored = np.asarray(stats.scored[b]).reshape(KV_HEADS, -1)
        assert np.all(stats.kept[b] >= exact + scored.max(axis=1))
        assert np.all(stats.kept[b] <= exact + scored.sum(axis=1))
    assert np.any(stats.kept[0] < 151)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["query", "new key", "window key", "quantized key", "sink key"])
@pytest.mark.parametrize("dense_layer", [False, True])
def test_what_is_not_finite_shows_in_the_output(place, bad, dense_layer):
    config = None if dense_layer else RaBitQConfig(top_p=0.3, **SMALL)
    query, key, value = prompt()
    new_query, new_key, new_value = (x[:, 0] for x in prompt(seed=3, tokens=1))
    if place == "query":
        new_query[1, 2, 3] = bad
    elif place == "new key":
        new_key[1, 0, 3] = bad
    else:
        key[1, {"window key": 50, "quantized key": 20, "sink key": 1}[place], 0, 3] = bad
    _, cache = prefill(query, key, value, empty_cache(config), config, new_tokens=PROMPT)
    out, _, _ = decode(new_query, new_key, new_value, cache, config, prng_key=jax.random.key(0))
    assert np.isfinite(out).all(axis=(1, 2)).tolist() == [True, False, True]


def test_one_compilation_and_no_copy_of_the_cache():
    """40 steps over two blocks run one program, which returns the cache in the memory it came in."""
    config = RaBitQConfig(**SMALL)
    step = jax.jit(attention.decode, static_argnames=("config",), donate_argnames=("cache",))
    cache = init_layer_cache(1, 16384, KV_HEADS, 64, config, dtype=jnp.float32)
    cache = dataclasses.replace(cache, length=jnp.array([100]), quantized=jnp.array([64]))
    query, token = jnp.ones((1, HEADS, 64)), jnp.ones((1, KV_HEADS, 64))
    memory = step.lower(query, token, token, cache, config, prng_key=jax.random.key(0)).compile().memory_analysis()
    keys_bytes = cache.keys.nbytes
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    # The reference unpacks all bits to float32 signs, which are as large as these keys; a copy would come on top.
    assert memory.temp_size_in_bytes < 1.5 * keys_bytes
    for n in range(40):
        _, cache, _ = step(query, token, token, cache, config, prng_key=jax.random.key(n))
    assert cache.quantized.tolist() == [96] and step._cache_size() == 1


def arguments(**changes):
    arrays = dict(query=jnp.ones((3, 6, 20)), key=jnp.ones((3, 2, 20)), value=jnp.ones((3, 2, 20)))
    return arrays | changes


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(query=jnp.ones((2, 6, 20))), "query must be"),
        (dict(query=jnp.ones((3, 5, 20))), "a multiple of 2 heads"),
        (dict(query=jnp.ones((3, 6, 24))), "query must be"),
        (dict(key=jnp.ones((3, 3, 20))), "key and value must be"),
        (dict(value=jnp.ones((3, 2, 24))), "key and value must be"),
        (dict(key=jnp.ones((2, 2, 20)), value=jnp.ones((2, 2, 20))), "key and value must be"),
        (dict(query=jnp.ones((3, 6, 20), jnp.int32)), "query must be floating, got int32"),
        (dict(value=jnp.ones((3, 2, 20), bool)), "value must be floating, got bool"),
    ],
)
def test_arrays_that_do_not_fit_the_cache(changes, message):
    config = RaBitQConfig(**SMALL)
    with pytest.raises(ValueError, match=message):
        attention.decode(**arguments(**changes), cache=empty_cache(config), config=config, prng_key=jax.random.key(0))
    chunk = {name: array[:, None] for name, array in arguments(**changes).items()}
    with pytest.raises(ValueError, match=message):
        attention.prefill(**chunk, cache=empty_cache(config), config=config)


def test_missing_arguments_are_named():
    config = RaBitQConfig(**SMALL)
    with pytest.raises(ValueError, match="needs a PRNG key"):
        attention.decode(**arguments(), cache=empty_cache(config), config=config)
    with pytest.raises(ValueError, match="config is None"):
        attention.decode(**arguments(), cache=empty_cache(config), config=None)
    with pytest.raises(ValueError, match="config is None"):
        attention.prefill(*(x[:, None] for x in arguments().values()), cache=empty_cache(config), config=None)
