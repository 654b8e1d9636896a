"""Error of the estimated logits for every choice of the algorithm, and what Top-p delivers with it.

    python -m benchmarks.logit_error       # writes benchmarks/results/logit_error.json and .png

Heads are synthetic (synthetic.py). Errors are in nats: the standard deviation of estimated minus exact scaled logits.
Bytes are those that scoring a token reads, its share of a centroid included.
"""

import dataclasses
import functools
import itertools
import typing

import click
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.plot_logit_error import plot
from benchmarks.record import RESULTS, commit_option, write_result
from benchmarks.synthetic import KINDS, make_heads
from rabitq_jax import RaBitQConfig, codes, rotation
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.config import KeyCentroid, QueryCentroid, QueryRounding, RotationKind, TopPScope
from rabitq_jax.scores import proxy_scores
from rabitq_jax.top_p import select_top_p

HEAD_DIMS = (64, 128)
SHARES = (0.85, 0.95)
QUERY_OFFSETS = (0.0, 0.5, 1.0, 2.0, 4.0)
CHOICES = {
    "rotation": typing.get_args(RotationKind),
    "key_centroid": typing.get_args(KeyCentroid),
    "query_centroid": typing.get_args(QueryCentroid),
    "query_rounding": typing.get_args(QueryRounding),
}


@functools.partial(jax.jit, static_argnames=("config",))
def estimate(query, prompt_queries, keys, matrix, rounding_key, config):
    """Estimated scaled logits [K,G,T] of every token, by the library's own operations, and bytes read a token."""
    kv_heads, tokens, head_dim = keys.shape
    held = init_layer_cache(1, tokens, kv_heads, head_dim, config).codes
    assert held is not None
    held = dataclasses.replace(held, rotation=matrix)
    if config.key_centroid == "prompt":
        mean = jnp.mean(keys, axis=1, keepdims=True)[None]
        held = dataclasses.replace(held, key_centroids=mean.astype(held.key_centroids.dtype))
    if config.query_centroid == "prompt":
        held = dataclasses.replace(held, query_centroid=jnp.mean(prompt_queries, axis=1)[None])
    blocks = jnp.array([tokens // config.interval])
    held = codes.update_codes(
        keys[None], held, 0 * blocks, blocks, interval=config.interval, max_blocks=tokens // config.interval
    )
    quantized = codes.quantize_query(
        query[None], matrix, held.query_centroid, rounding=config.query_rounding, key=rounding_key
    )
    scores = proxy_scores(query[None], quantized, held, jnp.array([tokens]), softmax_scale=head_dim**-0.5)
    return scores[0], held.bytes_per_token + 2 * head_dim / held.tokens_per_centroid


def estimate_heads(heads, config: RaBitQConfig, seed: int):
    """`estimate` with a rotation and a rounding of this seed: float64 [K,G,T], and bytes a token."""
    rotation_key, rounding_key = jax.random.split(jax.random.key(seed))
    matrix = rotation.draw(rotation_key, heads.keys.shape[-1], config.rotation)
    scores, size = estimate(heads.query, heads.prompt_queries, heads.keys, matrix, rounding_key, config)
    return np.asarray(scores, np.float64), float(size)


def error(seeds, config: RaBitQConfig) -> dict[str, float]:
    """Deviation of a logit's error, mean over seeds, and the bytes of a token."""
    deviations, size = [], 0.0
    for seed, heads in enumerate(seeds):
        scores, size = estimate_heads(heads, config, seed)
        # The sinks are always attended exactly.
        deviations.append(np.std((scores - heads.logits)[..., config.sink :]))
    standard_error = np.std(deviations, ddof=1) / len(deviations) ** 0.5
    return {"nats": float(np.mean(deviations)), "standard_error": float(standard_error), "bytes_per_token": size}


def measure_errors(data) -> list[dict]:
    """One row a kind, head dimension and combination of choices."""
    rows = []
    for (kind, head_dim), seeds in data.items():
        for values in itertools.product(*CHOICES.values()):
            choices = dict(zip(CHOICES, values, strict=True))
            found = error(seeds, RaBitQConfig(**choices))
            rows.append({"kind": kind, "head_dim": head_dim, **choices, **found})
    return rows


def measure_query_offsets(tokens: int, seeds: int) -> list[dict]:
    """What the query centroid gains by the size of the queries' mean; the last kind, the other choices default."""
    rows = []
    for offset in QUERY_OFFSETS:
        heads = [make_heads("low rank", tokens, 128, seed, query_offset=offset) for seed in range(seeds)]
        for centroid in CHOICES["query_centroid"]:
            found = error(heads, RaBitQConfig(query_centroid=centroid))
            rows.append({"query_offset": offset, "query_centroid": centroid, **found})
    return rows


def measure_delivery(data) -> list[dict]:
    """What Top-p keeps, and the true attention in it, with the default choices; one row a kind, dimension, scope, p."""
    rows = []
    for ((kind, head_dim), seeds), scope, p in itertools.product(data.items(), typing.get_args(TopPScope), SHARES):
        config = RaBitQConfig(top_p=p, top_p_scope=scope)
        runs = [deliver(heads, config, seed) for seed, heads in enumerate(seeds)]
        row = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        rows.append({"kind": kind, "head_dim": head_dim, "top_p_scope": scope, "top_p": p, **row})
    return rows


def deliver(heads, config: RaBitQConfig, seed: int) -> dict[str, float]:
    """Means over heads: tokens attended, selected on estimates and on exact logits, and the true attention that a query
    head's own tokens hold."""
    logits, tokens = heads.logits, heads.keys.shape[1]
    quantized = config.quantized_length(tokens)
    scored = np.arange(config.sink, quantized)
    mass = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    exact_mass = 1 - mass[..., scored].sum(axis=-1)
    exact_lse = np.full(mass.shape[:2], -np.inf)
    if config.top_p_scope == "all":
        exact_lse = np.logaddexp.reduce(np.delete(logits, scored, axis=-1), axis=-1)
    found = {"exact_tokens_hold": float(exact_mass.mean())}
    for name, scores in (("", estimate_heads(heads, config, seed)[0]), ("_on_exact_logits", logits)):
        selection = select_top_p(
            jnp.asarray(scores[None], jnp.float32), jnp.asarray(exact_lse[None], jnp.float32),
            jnp.array([quantized]), jnp.array([tokens]), sink=config.sink, top_p=config.top_p, implementation="xla",
        )  # fmt: skip
        best_first = np.argsort(-scores[..., scored], axis=-1)
        own = np.arange(len(scored)) < np.asarray(selection.scored[0])[..., None]
        held = np.sum(np.take_along_axis(mass[..., scored], best_first, axis=-1) * own, axis=-1)
        found[f"kept{name}"] = float(np.mean(selection.counts) / tokens)
        found[f"delivered{name}"] = float(np.mean(exact_mass + held))
    return found


@click.command(help=__doc__.split("\n")[0])
@click.option("--tokens", default=8192, show_default=True)
@click.option("--seeds", default=4, show_default=True)
@commit_option
def main(tokens: int, seeds: int, commit: str) -> None:
    data = {
        (kind, head_dim): [make_heads(kind, tokens, head_dim, seed) for seed in range(seeds)]
        for kind in KINDS
        for head_dim in HEAD_DIMS
    }
    tables = {
        "errors": measure_errors(data),
        "query_offsets": measure_query_offsets(tokens, seeds),
        "delivery": measure_delivery(data),
    }
    for title, rows in tables.items():
        print_table(title, rows)
    write_result("logit_error.json", {"tokens": tokens, "seeds": seeds, "kinds": KINDS, **tables}, commit=commit)
    plot(tables["errors"], tables["delivery"], RESULTS / "logit_error.png")


def print_table(title: str, rows: list[dict]) -> None:
    click.echo(f"\n{title}")
    table = [list(rows[0])]
    table += [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        click.echo("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
