"""Known texts through decode steps: what the model would have said, and what its attention had, at each of them.

A greedy reply equals the answer exactly if, fed with the answer, the model finds each of its tokens the most likely
one. So one pass gives accuracy, divergence from dense decoding and the attention that was captured. It is a little
stricter than `generate`: the first token too is a decode step's, which there the exact prefill gives.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.exact import captured_mass, exact_logits, is_scored
from rabitq_jax import Cache, RaBitQConfig, attention
from rabitq_jax.cache import LayerCache, append
from rabitq_jax.codes import quantize_query
from rabitq_jax.decode_stats import DecodeStats
from rabitq_jax.decoding import ModelDefinition
from rabitq_jax.generation import Decoder
from rabitq_jax.scores import proxy_scores
from rabitq_jax.selectors import Selector, Step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerProbe:
    """One decode step of one layer. Numbers of a dense layer are those of attention to everything.

    Attributes:
      kept: float32 [B,K], share of tokens attended.
      claimed: float32 [B,H], attention mass of each query head's own tokens by the estimate; NaN where a selector
        estimates none.
      captured: float32 [B,H], true attention mass in the tokens that its kv head attends.
      error: float32 [B,H], deviation of the estimated logits from the exact ones over scored tokens, in nats, without
        their common shift; 0 under a selector.
      output_error: float32 [B,H], distance of each query head's output to dense attention's, relative to that.
      bytes_read, bytes_dense: float32 [B].
      verified, extended, certified: of `DecodeStats`, float32 [B,H]; None where the configuration verifies nothing.
    """

    kept: jax.Array
    claimed: jax.Array
    captured: jax.Array
    error: jax.Array
    output_error: jax.Array
    bytes_read: jax.Array
    bytes_dense: jax.Array
    verified: jax.Array | None = None
    extended: jax.Array | None = None
    certified: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """A text's tokens through decode steps; B texts, up to N steps, L layers, vocabulary V.

    Attributes:
      log_probs: float32 [B,N,V], of the token after each step's.
      targets: int32 [B,N], the tokens that come.
      valid: bool [B,N], False past a text's end.
      probes: LayerProbe of arrays [B,N,L,...].
    """

    log_probs: np.ndarray
    targets: np.ndarray
    valid: np.ndarray
    probes: LayerProbe


def teacher_forced(
    model: Decoder,
    cache: Cache,
    last: np.ndarray,
    texts: Sequence[Sequence[int]],
    config: RaBitQConfig | Selector | None,
    *,
    key: jax.Array,
    steps: int | None = None,
) -> Pass:
    """Decode known texts, one given token after the other.

    Args:
      cache: holds the prompts but for the last token of each, int32 [B], which is the first that is decoded.
      texts: token ids that follow, at least one for each prompt, and of any lengths.
      config: the one the cache was made with.
      key: PRNG key of the queries' rounding.
      steps: decode steps; by default the longest text's, and no fewer.
    """
    steps = steps or max(map(len, texts))
    targets = np.stack([np.pad(np.asarray(text, np.int32), (0, steps - len(text))) for text in texts])
    inputs = np.concatenate([last[:, None], targets[:, :-1]], axis=1)
    definition, params = ModelDefinition.split(model)
    log_probs, probes = _decode_known(definition, params, cache, inputs, key, config=config)
    valid = np.arange(steps) < np.array([len(text) for text in texts])[:, None]
    return Pass(log_probs=np.asarray(log_probs), targets=targets, valid=valid, probes=jax.tree.map(np.asarray, probes))


@functools.partial(jax.jit, static_argnames=("definition", "config"))
def _decode_known(definition: ModelDefinition, params, cache, inputs, key, *, config: RaBitQConfig | Selector | None):
    """float32 [B,N,V] log-probabilities, and LayerProbe [B,N,L,...], of feeding int32 [B,N] tokens one by one."""
    model = definition.merge(params)

    def step(cache, step_inputs):
        index, token = step_inputs
        rounding_key = jax.random.fold_in(key, index)
        previous = None

        def attend(layer, query, new_key, value, layer_cache):
            nonlocal previous
            parts, below = (query[:, 0], new_key[:, 0], value[:, 0]), previous
            prng_key = jax.random.fold_in(rounding_key, layer)
            out, new_cache, stats = attention.decode(*parts, layer_cache, config, prng_key=prng_key, previous=below)
            previous = previous if new_cache.state is None else new_cache
            return out[:, None], new_cache, _probe(*parts, layer_cache, out, stats, config, prng_key, below)

        length = cache.length
        hidden, layers, probes = model(token[:, None], length[:, None], length + 1, cache.layers, attend)
        log_probs = jax.nn.log_softmax(model.logits(hidden[:, 0]))
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers, axis=1), *probes)
        return dataclasses.replace(cache, layers=layers), (log_probs, stacked)

    steps = inputs.shape[1]
    _, outputs = jax.lax.scan(step, cache, (jnp.arange(steps), jnp.moveaxis(inputs, 1, 0)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs)


def _probe(
    query, key, value, cache: LayerCache, out, stats: DecodeStats, config, prng_key, previous: LayerCache | None
) -> LayerProbe:
    """What `attention.decode` of these arguments, which gave `out` and `stats`, attended, against exact attention."""
    batch, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    cache = append(cache, key[:, None], value[:, None], jnp.ones_like(cache.length))
    shares = {
        "kept": stats.kept / cache.length[:, None],
        "claimed": stats.mass,
        "bytes_read": stats.bytes_read,
        "bytes_dense": stats.bytes_dense,
    }
    if isinstance(config, RaBitQConfig) and config.selection != "plain":
        verification = {name: getattr(stats, name) for name in ("verified", "extended", "certified")}
        shares |= {name: value.astype(jnp.float32) for name, value in verification.items()}
    ones = jnp.ones((batch, heads), jnp.float32)
    if cache.codes is None and cache.selector is None:
        return LayerProbe(**shares, captured=ones, error=0 * ones, output_error=0 * ones)
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    softmax_scale = head_dim**-0.5
    # The same arguments and key as in the step: the same tokens.
    if cache.selector is None:
        _, selection, _ = attention.attend_selected(grouped, cache, config, softmax_scale, prng_key)
    else:
        step = Step(
            softmax_scale=softmax_scale, new_tokens=jnp.ones_like(cache.length), previous=previous and previous.state
        )
        selection = attention.attend_with_selector(grouped, cache, step)[1].selection
    exact = exact_logits(grouped, cache)
    captured = captured_mass(exact, selection.indices, selection.counts)
    dense = jnp.einsum(
        "bkgt,bktd->bkgd", jax.nn.softmax(exact, axis=-1), cache.values.astype(jnp.float32), precision="highest"
    ).reshape(out.shape)
    output_error = jnp.linalg.norm(out - dense, axis=-1) / jnp.linalg.norm(dense, axis=-1)

    if cache.codes is None:
        return LayerProbe(**shares, captured=captured.reshape(batch, heads), error=0 * ones, output_error=output_error)
    quantized = quantize_query(
        grouped, cache.codes.rotation, cache.codes.query_centroid, rounding=config.query_rounding, key=prng_key
    )
    estimate = proxy_scores(
        grouped, quantized, cache.codes, cache.quantized, softmax_scale=softmax_scale, implementation="xla"
    )
    scored = is_scored(cache, config.sink)
    count = jnp.maximum(jnp.sum(scored, axis=-1), 1)
    difference = jnp.where(scored, estimate - exact, 0)
    mean = jnp.sum(difference, axis=-1) / count
    variance = jnp.sum(jnp.where(scored, (difference - mean[..., None]) ** 2, 0), axis=-1) / count
    return LayerProbe(
        **shares, captured=captured.reshape(batch, heads), error=jnp.sqrt(variance).reshape(batch, heads),
        output_error=output_error,
    )  # fmt: skip
