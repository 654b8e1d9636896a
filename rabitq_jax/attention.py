"""Attention with a RaBitQ cache: `prefill` for the prompt, `decode` for each new token.

A decode step: append the new token; estimate every quantized token's logit from its bits; keep the tokens that hold a
share p of the mass; attend exactly over those, the sinks and the unquantized window; quantize the oldest block of the
window when it is full.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rabitq_jax import codes as key_codes
from rabitq_jax.cache import (
    Cache,
    LayerCache,
    append,
    init_codes,
    init_scored_values,
    init_state,
    layer_rotation_key,
)
from rabitq_jax.certified_attention import Verification, attend_certified
from rabitq_jax.config import RaBitQConfig
from rabitq_jax.decode_stats import DecodeStats, ReadSizes
from rabitq_jax.dense_attention import decode_attention, prefill_attention
from rabitq_jax.gathered_attention import gathered_attention
from rabitq_jax.selection import choose_tokens
from rabitq_jax.selectors import Attended, CacheShape, Selector, Step


def decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: LayerCache,
    config: RaBitQConfig | Selector | None,
    *,
    prng_key: jax.Array | None = None,
    layer: int = 0,
    active: jax.Array | None = None,
    previous: LayerCache | None = None,
) -> tuple[jax.Array, LayerCache, DecodeStats]:
    """Append one token to every sequence and attend to the cache.

    Args:
      query: [B,H,D] and key, value: [B,K,D] of the new tokens, after rotary embedding; H a multiple of K.
      cache: with room for one more token (checked by the caller, on the host: lengths are traced here).
      config: the one the cache was made with; not used by a layer without codes, which attends densely, or by the
        selector that the cache holds.
      prng_key: for config.query_rounding "random".
      layer: layers that share prng_key round independently.
      active: bool [B]; a sequence that is not keeps its cache, and its output means nothing. All by default.
      previous: the cache of the nearest layer below that keeps a state, as this step has left it: for selectors that
        share between layers.

    Returns:
      Output [B,H,D] in query's dtype, the new cache, and stats.

    Raises:
      ValueError: shapes or dtypes disagree with the cache, or a PRNG key is missing.
    """
    _check_heads(query, key, value, cache)
    batch, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    softmax_scale = head_dim**-0.5
    new_tokens = jnp.ones_like(cache.length) if active is None else active.astype(jnp.int32)
    cache = append(cache, key[:, None], value[:, None], new_tokens)
    if cache.selector is not None:
        step = Step(softmax_scale=softmax_scale, new_tokens=new_tokens, previous=previous and previous.state)
        cache, attended = attend_with_selector(grouped, cache, step)
        out, stats = attended.out, _selector_stats(attended, cache)
    elif cache.codes is None:
        out = decode_attention(grouped, cache.keys, cache.values, cache.length, softmax_scale=softmax_scale)
        stats = _dense_stats(cache, heads)
    else:
        if not isinstance(config, RaBitQConfig):
            raise ValueError(f"config is {config}, but the cache has codes: pass the RaBitQConfig it was made with")
        out, _, stats = attend_selected(grouped, cache, config, softmax_scale, prng_key, layer)
        cache = _quantize_full_blocks(cache, config, max_blocks=1)
    return out.reshape(query.shape).astype(query.dtype), cache, stats


def attend_with_selector(query, cache: LayerCache, step: Step) -> tuple[LayerCache, Attended]:
    """Attention of queries [B,K,G,D] under the cache's selector, once the new token is in the cache."""
    assert cache.selector is not None
    state = cache.selector.update(cache.state, cache, step)
    attended = cache.selector.attend(query, state, cache, step)
    return dataclasses.replace(cache, state=attended.state), attended


def _selector_stats(attended: Attended, cache: LayerCache) -> DecodeStats:
    flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
    return DecodeStats(
        length=cache.length,
        quantized=cache.quantized,
        kept=attended.selection.counts,
        read=attended.selection.counts,
        scored=flat(attended.selection.scored),
        mass=flat(attended.selection.mass),
        sizes=ReadSizes(row=cache.keys.shape[3] * cache.keys.dtype.itemsize),
        selector_bytes=attended.bytes_read,
    )


def attend_selected(query, cache: LayerCache, config: RaBitQConfig, softmax_scale: float, prng_key, layer: int = 0):
    """Attention of one token over those that config.selection chooses; arguments as of `selection.choose_tokens`.

    Returns:
      [B,K,G,D], the selection, and stats.
    """
    if config.selection == "plain":
        with jax.named_scope("select_tokens"):
            selection = choose_tokens(query, cache, config, softmax_scale, prng_key, layer)
        with jax.named_scope("gathered_attention"):
            out = gathered_attention(
                query, cache.keys, cache.values, selection.indices, selection.counts,
                softmax_scale=softmax_scale, dtype=query.dtype, implementation=config.attend,
            )  # fmt: skip
        read, verified = selection.counts, {}
    else:
        out, selection, verification = attend_certified(query, cache, config, softmax_scale, prng_key, layer)
        read, verified = verification.read, _verified_stats(verification, config)
    batch = query.shape[0]
    stats = DecodeStats(
        length=cache.length,
        quantized=cache.quantized,
        kept=selection.counts,
        read=read,
        scored=selection.scored.reshape(batch, -1),
        mass=selection.mass.reshape(batch, -1),
        sizes=_read_sizes(cache, config),
        **verified,
    )
    return out, selection, stats


def _verified_stats(verification: Verification, config: RaBitQConfig) -> dict[str, jax.Array]:
    flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
    return {
        "verified": flat(verification.verified),
        "bound": flat(verification.bound),
        "extended": flat(verification.extended),
        "certified": flat(verification.bound >= config.top_p),
    }


def _read_sizes(cache: LayerCache, config: RaBitQConfig) -> ReadSizes:
    assert cache.codes is not None
    head_dim = cache.keys.shape[3]
    return ReadSizes(
        row=head_dim * cache.keys.dtype.itemsize,
        code=cache.codes.bytes_per_token,
        centroid=head_dim * cache.codes.key_centroids.dtype.itemsize,
        tokens_per_centroid=cache.codes.tokens_per_centroid,
        exact_keys_twice=config.top_p_scope == "all",
        sink=config.sink,
        tail=0 if cache.scored_values is None else head_dim * cache.scored_values.dtype.itemsize,
    )


def _dense_stats(cache: LayerCache, heads: int) -> DecodeStats:
    batch, kv_heads, _, head_dim = cache.keys.shape
    ones, all_tokens = jnp.ones((batch, heads), jnp.float32), jnp.broadcast_to(cache.length[:, None], (batch, kv_heads))
    return DecodeStats(
        length=cache.length,
        quantized=cache.quantized,
        kept=all_tokens,
        read=all_tokens,
        scored=jnp.zeros((batch, heads), jnp.int32),
        mass=ones,
        verified=ones,
        bound=ones,
        extended=ones < 1,
        certified=ones == 1,
        sizes=ReadSizes(row=head_dim * cache.keys.dtype.itemsize),
    )


def _quantize_full_blocks(cache: LayerCache, config: RaBitQConfig, *, max_blocks: int) -> LayerCache:
    """The lazy update: quantize the window's oldest blocks, all but the last `recent` tokens' whole blocks."""
    assert cache.codes is not None
    quantized = jnp.maximum(cache.quantized, config.quantized_length(cache.length))
    codes = key_codes.update_codes(
        cache.keys, cache.codes, cache.quantized // config.interval, quantized // config.interval,
        interval=config.interval, max_blocks=max_blocks, implementation=config.quantize,
    )  # fmt: skip
    scored_values = cache.scored_values
    if scored_values is not None:
        scored_values += _sum_new_values(cache, quantized, config, max_tokens=max_blocks * config.interval)
    return dataclasses.replace(cache, codes=codes, quantized=quantized, scored_values=scored_values)


def _sum_new_values(cache: LayerCache, quantized, config: RaBitQConfig, *, max_tokens: int):
    """float32 [B,K,D]: sum of the values of the scored tokens in [cache.quantized, quantized), max_tokens at most."""

    def one_sequence(values, first, stop):
        start = jnp.minimum(first, values.shape[1] - max_tokens)
        position = start + jnp.arange(max_tokens)
        new = (position >= jnp.maximum(first, config.sink)) & (position < stop)
        part = jax.lax.dynamic_slice_in_dim(values, start, max_tokens, axis=1).astype(jnp.float32)
        return jnp.sum(jnp.where(new[:, None], part, 0), axis=1)

    return jax.vmap(one_sequence)(cache.values, cache.quantized, quantized)


def prefill(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: LayerCache,
    config: RaBitQConfig | Selector | None,
    *,
    new_tokens: jax.Array | None = None,
    fresh: bool = False,
    last: bool = True,
) -> tuple[jax.Array, LayerCache]:
    """Append a chunk of the prompt and attend causally and exactly; with the last chunk, build the codes.

    Args:
      query: [B,N,H,D] and key, value: [B,N,K,D], after rotary embedding.
      cache: with room for the chunk (checked by the caller, on the host).
      config: the one the cache was made with; not used by a layer without codes, or by the cache's selector.
      new_tokens: int32 [B], real tokens of the chunk, the rest being padding at its end; all N by default.
      fresh: the cache is empty, so that the chunk alone is attended. Never required, and faster.
      last: no chunk of this prompt follows. Codes are built, of all but the recent window. Centroids of the prompt
        are means over the tokens held then, set once for each sequence: later prompts and new tokens use them too.

    Returns:
      Output [B,N,H,D] in query's dtype (undefined at padding), and the new cache.

    Raises:
      ValueError: shapes or dtypes disagree with the cache.
    """
    _check_heads(query, key, value, cache)
    batch, chunk, _, head_dim = query.shape
    if new_tokens is None:
        new_tokens = jnp.full((batch,), chunk, jnp.int32)
    start = cache.length
    cache = append(cache, key, value, new_tokens)
    with jax.named_scope("prefill_attention"):
        out = prefill_attention(query, cache.keys, cache.values, start, fresh=fresh, softmax_scale=head_dim**-0.5)
    if cache.selector is not None:
        with jax.named_scope("build_state"):
            state = cache.selector.observe(cache.state, cache, query, new_tokens)
            if last:
                state = cache.selector.build(state, cache)
        return out, dataclasses.replace(cache, state=state)
    if cache.codes is None:
        return out, cache
    if not isinstance(config, RaBitQConfig):
        raise ValueError(f"config is {config}, but the cache has codes: pass the RaBitQConfig it was made with")
    with jax.named_scope("build_codes"):
        if cache.codes.query_centroid is not None:
            cache = _update_query_centroid(cache, query, start, new_tokens)
        if last:
            cache = build_codes(cache, config)
    return out, cache


def add_codes(cache: Cache, config: RaBitQConfig | Selector) -> Cache:
    """A densely prefilled cache with the codes, or the selector's states, that prefilling it under `config` would have
    made.

    So a prompt that has been read once can be continued under several configurations. Keys and values are not copied.

    Raises:
      ValueError: the cache has codes or a selector, its capacity is not a multiple of the interval or the selector's
        block, or config.query_centroid is "prompt" or the selector learns from queries, which a cache does not hold.
    """
    if isinstance(config, Selector):
        return _add_states(cache, config)
    if config.query_centroid == "prompt":
        raise ValueError("query_centroid 'prompt' needs the prompt's queries: prefill under this config instead")
    if any(layer.codes is not None or layer.selector is not None for layer in cache.layers):
        raise ValueError("cache has codes already: prefill it with config None")
    if cache.capacity % config.interval:
        raise ValueError(f"the cache's capacity must be a multiple of interval {config.interval}, got {cache.capacity}")
    layers = list(cache.layers)
    for index in range(config.dense_layers, len(layers)):
        batch, kv_heads, capacity, head_dim = layers[index].keys.shape
        rotation_key = layer_rotation_key(config.rotation_seed, index)
        codes = init_codes(batch, capacity, kv_heads, head_dim, config, rotation_key)
        scored_values = init_scored_values(batch, kv_heads, head_dim, config)
        layer = dataclasses.replace(layers[index], codes=codes, scored_values=scored_values)
        layers[index] = build_codes(layer, config)
    return Cache(layers=tuple(layers), rotation_seed=jnp.uint32(config.rotation_seed))


def _add_states(cache: Cache, selector: Selector) -> Cache:
    """A densely prefilled cache under a selector."""
    if selector.observes:
        raise ValueError(f"{type(selector).__name__} learns from the prompt's queries: prefill under it instead")
    if any(layer.codes is not None or layer.selector is not None for layer in cache.layers):
        raise ValueError("cache has codes or a selector already: prefill it with config None")
    layers = []
    for index, layer in enumerate(cache.layers):
        batch, kv_heads, capacity, head_dim = layer.keys.shape
        # How many query heads there are matters to those alone that learn from queries.
        shape = CacheShape(
            batch=batch, capacity=capacity, num_heads=kv_heads, num_kv_heads=kv_heads, head_dim=head_dim,
            dtype=layer.keys.dtype,
        )  # fmt: skip
        own = selector.for_layer(index, len(cache.layers))
        state = init_state(shape, own)
        layers.append(dataclasses.replace(layer, selector=own, state=own.build(state, layer)))
    return Cache(layers=tuple(layers), rotation_seed=jnp.uint32(0))


def build_codes(cache: LayerCache, config: RaBitQConfig) -> LayerCache:
    """Codes of all but the recent window, once the last chunk of a prompt is in the cache."""
    if config.key_centroid == "prompt":
        cache = _set_prompt_centroid(cache)
    return _quantize_full_blocks(cache, config, max_blocks=cache.capacity // config.interval)


def _set_prompt_centroid(cache: LayerCache) -> LayerCache:
    """c_k: the mean of the keys held, in sequences that have no codes yet."""
    assert cache.codes is not None
    held = jnp.arange(cache.capacity) < cache.length[:, None]
    total = jnp.einsum("bt,bktd->bkd", held.astype(jnp.float32), jnp.where(held[:, None, :, None], cache.keys, 0))
    mean = (total / jnp.maximum(cache.length, 1)[:, None, None])[:, :, None]
    old = cache.codes.key_centroids
    new = jnp.where((cache.quantized == 0)[:, None, None, None], key_codes.round_to_bfloat16(mean), old)
    return dataclasses.replace(cache, codes=dataclasses.replace(cache.codes, key_centroids=new))


def _update_query_centroid(cache: LayerCache, query, start, new_tokens) -> LayerCache:
    """c_q: the running mean of the prompt's queries, all query heads of a kv head together, until there are codes."""
    assert cache.codes is not None and cache.codes.query_centroid is not None
    real = (jnp.arange(query.shape[1]) < new_tokens[:, None])[..., None, None]
    grouped = query.reshape(*query.shape[:2], cache.keys.shape[1], -1, query.shape[-1])
    total = jnp.sum(jnp.where(real, jnp.mean(grouped.astype(jnp.float32), axis=3), 0), axis=1)
    old = cache.codes.query_centroid
    before, after = start[:, None, None], jnp.maximum(start + new_tokens, 1)[:, None, None]
    new = jnp.where((cache.quantized == 0)[:, None, None], (old * before + total) / after, old)
    return dataclasses.replace(cache, codes=dataclasses.replace(cache.codes, query_centroid=new))


def _check_heads(query, key, value, cache: LayerCache):
    """Check static facts of [B,...,H,D] queries and [B,...,K,D] keys and values against the cache."""
    batch, kv_heads, _, head_dim = cache.keys.shape
    if key.shape != (batch, *query.shape[1:-2], kv_heads, head_dim) or value.shape != key.shape:
        raise ValueError(
            f"key and value must be {(batch, *query.shape[1:-2], kv_heads, head_dim)} to fit query {query.shape} and "
            f"the cache, got {key.shape} and {value.shape}"
        )
    if query.shape[0] != batch or query.shape[-1] != head_dim or query.shape[-2] % kv_heads:
        raise ValueError(
            f"query must be [{batch}, ..., a multiple of {kv_heads} heads, {head_dim}] to fit the cache, "
            f"got {query.shape}"
        )
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
