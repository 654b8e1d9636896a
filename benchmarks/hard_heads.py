"""Attention heads that are hard for a promise: what each of them would break is said beside it.

Each group of heads has a rotation and roundings of its own. Drawing, coding and measuring are programs apart, so that
few of them serve many kinds and configurations.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.exact import captured_mass, exact_logits, is_scored
from rabitq_jax import RaBitQConfig, attention
from rabitq_jax.cache import LayerCache, init_layer_cache

KINDS = {
    "random": "independent normal keys: flat attention, and noise as large as the signal",
    "needle": "one token holds 1.2 (1 - p) of the attention, exact tokens nearly all the rest: without it p is missed",
    "heavy-tailed": "logits of a Student distribution with three degrees of freedom: no Gaussian prior fits",
    "low rank": "nine tenths of the keys' variance in 16 directions: errors depend on each other",
    "aligned": "a twentieth of the keys along one direction, at cosines of 0.9, just below the best: errors in common",
}
HEAD_DIM, KV_HEADS, QUERIES = 64, 8, 4
# Heads drawn in one call, and rotations that each of them goes through: the promise is one over rotations.
GROUPS_AT_ONCE, ROTATIONS_EACH = 20, 8
RANK = 16


def draw_heads(key: jax.Array, kind: str, tokens: int, top_p: float, size: float) -> tuple[jax.Array, jax.Array]:
    """Queries [K,G,D] and keys [K,T,D] of one of KINDS, float32. Logits deviate by `size` nats where nothing else is
    said, and the errors of their estimates by three quarters of it."""
    query_key, noise_key, logit_key, place_key = jax.random.split(key, 4)
    query = size * jax.random.normal(query_key, (KV_HEADS, QUERIES, HEAD_DIM))
    keys = jax.random.normal(noise_key, (KV_HEADS, tokens, HEAD_DIM))
    position = jnp.arange(tokens)
    if kind == "low rank":
        basis = jax.random.normal(place_key, (KV_HEADS, RANK, HEAD_DIM)) / RANK**0.5
        keys = 0.1**0.5 * keys + 0.9**0.5 * keys[..., :RANK] @ basis
    logits = jnp.einsum("kgd,ktd->kgt", query, keys, precision="highest") / HEAD_DIM**0.5
    if kind == "heavy-tailed":
        normal = jax.random.normal(logit_key, (4, *logits.shape))
        student = normal[0] / jnp.sqrt(jnp.mean(normal[1:] ** 2, axis=0))
        logits = jnp.clip(1.5 * student, -40, 40)
    if kind == "aligned":
        cluster = jax.random.uniform(place_key, (KV_HEADS, tokens)) < 0.05
        direction = jax.random.normal(logit_key, (KV_HEADS, 1, HEAD_DIM))
        keys = jnp.where(cluster[..., None], 0.9**0.5 * direction + 0.1**0.5 * keys, keys)
        best = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(cluster[:, None], best - 3, logits)
    if kind == "needle":
        rest = jax.nn.logsumexp(logits, axis=-1)
        place = jax.random.randint(place_key, (KV_HEADS, QUERIES, 1), tokens // 8, tokens * 3 // 4)
        # Other scored tokens hold 0.2 (1 - p) of the attention, the needle 1.2 (1 - p), and the first token the rest.
        needle = rest + math.log(1.2 / 0.2)
        sink = rest + math.log((1 - 1.4 * (1 - top_p)) / (0.2 * (1 - top_p)))
        logits = jnp.where(position == place, needle[..., None], logits)
        logits = jnp.where(position == 0, sink[..., None], logits)
    if kind in ("heavy-tailed", "aligned", "needle"):
        # The smallest change of the keys that gives them these logits.
        gram = jnp.einsum("kgd,khd->kgh", query, query, precision="highest")
        missing = logits * HEAD_DIM**0.5 - jnp.einsum("kgd,ktd->kgt", query, keys, precision="highest")
        keys = keys + jnp.einsum("kgt,kgd->ktd", jnp.linalg.solve(gram, missing), query, precision="highest")
    return query, keys


def measure_step(query: jax.Array, cache: LayerCache, config: RaBitQConfig, key: jax.Array) -> dict[str, jax.Array]:
    """What a step of queries [B,K,G,D] captures: float32 [B,K,G] each.

    captured: share of the exact attention in the tokens that the kv head attends; kept: share of the tokens; own_kept:
    share of the scored tokens that the query head selected; claimed: `Selection.mass`; and, where they are, the
    verification's stats.
    """
    shape, softmax_scale = query.shape[:3], query.shape[-1] ** -0.5
    _, selection, stats = attention.attend_selected(query, cache, config, softmax_scale, key)
    logits = exact_logits(query, cache)
    scored = jnp.maximum(jnp.sum(is_scored(cache, config.sink), axis=-1), 1)
    found = {
        "captured": captured_mass(logits, selection.indices, selection.counts),
        "kept": jnp.broadcast_to((selection.counts / cache.length[:, None])[..., None], shape),
        "own_kept": selection.scored / scored,
        "claimed": selection.mass,
    }
    verified = {name: getattr(stats, name) for name in ("verified", "bound", "extended", "certified")}
    return found | {name: value.reshape(shape) for name, value in verified.items() if value is not None}


@functools.partial(jax.jit, static_argnames=("kind", "tokens", "top_p", "size"))
def _draw(keys: jax.Array, kind: str, tokens: int, top_p: float, size: float):
    return jax.lax.map(lambda key: draw_heads(key, kind, tokens, top_p, size), keys)


@functools.partial(jax.jit, static_argnames=("config",))
def _code(rotation_keys: jax.Array, keys: jax.Array, config: RaBitQConfig) -> LayerCache:
    """Caches that hold keys [R,K,T,D] as after prompts of T tokens; their values are the keys."""

    def one_rotation(inputs):
        rotation_key, keys = inputs
        kv_heads, tokens, head_dim = keys.shape
        cache = init_layer_cache(1, tokens, kv_heads, head_dim, config, dtype=keys.dtype, rotation_key=rotation_key)
        cache = dataclasses.replace(cache, keys=keys[None], values=keys[None], length=jnp.array([tokens]))
        return attention.build_codes(cache, config)

    return jax.lax.map(one_rotation, (rotation_keys, keys))


@functools.partial(jax.jit, static_argnames=("config", "grouped"))
def _measure(rounding_keys: jax.Array, query: jax.Array, caches: LayerCache, config: RaBitQConfig, *, grouped: bool):
    def one_rotation(inputs):
        rounding_key, query, cache = inputs
        query = query[None] if grouped else query.swapaxes(0, 1)[:, :, None]
        # Queries that are alone see copies of one cache.
        cache = jax.tree.map(lambda x: jnp.repeat(x, len(query), axis=0) if x.shape[:1] == (1,) else x, cache)
        return jax.tree.map(jnp.ravel, measure_step(query, cache, config, rounding_key))

    return jax.lax.map(one_rotation, (rounding_keys, query, caches))


def measure_kind(
    key: jax.Array, kind: str, tokens: int, rotations: int, config: RaBitQConfig, *,
    grouped: bool = False, size: float = 2.0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`measure_step` of heads of a kind, with a rotation for each group of them, and all with roundings of their own.

    Args:
      rotations: a multiple of GROUPS_AT_ONCE; heads are new ones for every ROTATIONS_EACH of them.
      grouped: the QUERIES of a kv head are a group, and attend to the union of what they select; otherwise each is
        alone.
      size: as in `draw_heads`.

    Returns:
      float64 arrays of rotations * KV_HEADS * QUERIES head-steps.
    """
    if rotations % GROUPS_AT_ONCE:
        raise ValueError(f"rotations must be a multiple of {GROUPS_AT_ONCE}, got {rotations}")
    parts = []
    for i in range(rotations // GROUPS_AT_ONCE):
        heads, rotation, rounding = (
            jax.random.split(k, GROUPS_AT_ONCE) for k in jax.random.split(jax.random.fold_in(key, i), 3)
        )
        if i % ROTATIONS_EACH == 0:
            # The needle alone is made for a p.
            query, keys = _draw(heads, kind, tokens, config.top_p if kind == "needle" else 0.0, size)
        caches = _code(rotation, keys, RaBitQConfig())
        found = _measure(rounding, query, caches, config, grouped=grouped)
        parts.append(jax.tree.map(lambda x: np.asarray(x, np.float64).ravel(), found))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
