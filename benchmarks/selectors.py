"""Every retrieval method on the same planted answers: what it captures, answers and reads, at several budgets.

    python -m benchmarks.selectors                                      # the methods and budgets of METHODS
    python -m benchmarks.selectors --tokens 131072 --method quest:budget=1024 --method rabitq:top_p=0.9

writes benchmarks/results/selectors.json. A decode step of one attention layer, on any device.
"""

import dataclasses
import functools
from collections.abc import Iterator

import click
import jax
import jax.numpy as jnp

from benchmarks.exact import captured_mass, exact_logits
from benchmarks.needles import TASKS, Needles, make_needles
from benchmarks.record import commit_option, write_result
from benchmarks.timing import kernel_times
from rabitq_jax import RaBitQConfig, attention
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import LayerCache, append, init_layer_cache, init_selector_cache, round_capacity
from rabitq_jax.selectors import CacheShape, Selector, Step
from rabitq_jax.selectors.arguments import parse_selector

BUDGETS = (64, 128, 256, 512, 1024)
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
# What a comparison measures: a name, a method's text with a place for the budget, and budgets. A layer by itself is
# SnapKV where it is PyramidKV, and full attention or another layer's selection where it is TidalDecode: these two are
# compared on a whole model (benchmarks.quality).
METHODS = {
    "full": ("full", (None,)),
    "oracle top-k": ("oracle-top-k:sink=16,recent=64,budget={}", (128, 256, 512, 1024)),
    "oracle top-p": ("oracle-top-p:sink=16,recent=64,top_p={}", SHARES),
    "RaBitQ": ("rabitq:top_p={}", SHARES),
    "RaBitQ, prompt's centroid": ("rabitq:key_centroid=prompt,top_p={}", SHARES),
    "RaBitQ, not centred": ("rabitq:key_centroid=none,top_p={}", SHARES),
    "extended RaBitQ, 2 bits": ("extended-rabitq:bits=2,top_p={}", SHARES),
    "extended RaBitQ, 4 bits": ("extended-rabitq:bits=4,top_p={}", SHARES),
    "Quest": ("quest:page=16,budget={}", BUDGETS),
    "Twilight over Quest": ("twilight:base=quest,budget=1024,top_p={}", SHARES),
    "Twilight over full": ("twilight:base=full,top_p={}", SHARES),
    "SparQ": ("sparq:channels=16,budget={}", BUDGETS),
    "Double Sparsity": ("double-sparsity:channels=16,budget={}", BUDGETS),
    "PQCache": ("pqcache:parts=2,bits=6,sink=4,recent=16,budget={}", BUDGETS),
    "MagicPIG": ("magicpig:bits={},tables=75", (6, 8, 10)),
    "StreamingLLM": ("streaming-llm:recent={}", BUDGETS),
    "H2O": ("h2o:budget={}", BUDGETS),
    "SnapKV": ("snapkv:budget={}", BUDGETS),
    "DuoAttention": ("duo-attention:retrieval=0.5,sink=16,recent={}", (64, 256, 1024)),
    "KIVI": ("kivi:bits={}", (2, 4)),
}


@click.command(help=__doc__.split("\n")[0])
@click.option("--tokens", default=4096, show_default=True, help="In the cache, the new one included.")
@click.option("--head-dim", default=64, show_default=True)
@click.option("--problems", default=8, show_default=True, help="Of each task; each has 8 query heads.")
@click.option("--method", "methods", multiple=True, metavar="NAME:ARGUMENTS", help="Methods; METHODS by default.")
@click.option("--dtype", default="bfloat16", show_default=True)
@commit_option
def main(tokens: int, head_dim: int, problems: int, methods: tuple[str, ...], dtype: str, commit: str) -> None:
    chosen = [(method.partition(":")[0], method) for method in methods] or list(default_methods())
    tasks = {task: make_needles(task, tokens, head_dim, problems, seed=0) for task in TASKS}
    rows = []
    for name, method in chosen:
        for task, needles in tasks.items():
            row = {"name": name, "method": method, "task": task, **measure(needles, method, dtype)}
            rows.append(row)
            click.echo(
                f"{method:60} {task:6} right {row['right']:6.1%}  mass captured {row['captured']:.3f}  "
                f"attended {row['kept']:6.1%}  bytes {row['bytes_read']:6.1%}"
            )
    content = {
        "tokens": tokens, "head_dim": head_dim, "problems": problems, "dtype": dtype, "tasks": TASKS, "rows": rows,
    }  # fmt: skip
    click.echo(write_result("selectors.json", content, commit=commit))


def default_methods() -> Iterator[tuple[str, str]]:
    """Names and texts of METHODS, one a budget."""
    for name, (text, budgets) in METHODS.items():
        for budget in budgets:
            yield name, text.format(budget)


def measure(needles: Needles, method: str, dtype: str) -> dict[str, float | dict]:
    """A decode step of all problems: means over their query heads.

    right: share of the needles that are answered; captured: share of the exact attention in what is attended; kept:
    share of the tokens attended; bytes_read: over those of dense attention; output_error: distance of the output to
    dense attention's, relative to that; and on a GPU microseconds of the step's kernels, appending apart.
    """
    config = parse_selector(method)
    capacity = round_capacity(needles.keys.shape[1], config)
    arrays = (jnp.asarray(x, jnp.dtype(dtype)) for x in (needles.keys, needles.values, needles.queries))
    lengths = jnp.full((len(needles.keys),), needles.keys.shape[1], jnp.int32)
    cache = fill(*arrays, lengths, config=config, capacity=capacity)
    batch, kv_heads = cache.keys.shape[:2]
    query = jnp.asarray(needles.query, cache.keys.dtype).reshape(batch, kv_heads, -1, needles.query.shape[-1])
    out, selection, bytes_read = attend(query, cache, config=config)
    logits = exact_logits(query, cache)
    weights = jax.nn.softmax(logits, axis=-1)
    dense = jnp.einsum("bkgt,bktd->bkgd", weights, cache.values.astype(jnp.float32), precision="highest")
    answers = jnp.argmax(jnp.einsum("bkgd,cd->bkgc", out, needles.codes, precision="highest"), axis=-1)
    dense_bytes = 2 * cache.keys.dtype.itemsize * kv_heads * cache.length * query.shape[-1]
    error = jnp.linalg.norm(out - dense, axis=-1) / jnp.linalg.norm(dense, axis=-1)
    measured: dict[str, float | dict] = {
        "right": float(jnp.mean(answers.reshape(batch, -1) == needles.answers)),
        "captured": float(jnp.mean(captured_mass(logits, selection.indices, selection.counts))),
        "kept": float(jnp.mean(selection.counts / cache.length[:, None])),
        "bytes_read": float(jnp.mean(bytes_read / dense_bytes)),
        "output_error": float(jnp.mean(error)),
    }
    if on_gpu():
        times = kernel_times(functools.partial(attend, config=config), query, cache)[0]
        measured["microseconds"] = dataclasses.asdict(times)
    return measured


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def fill(keys, values, queries, lengths, *, config: RaBitQConfig | Selector, capacity: int) -> LayerCache:
    """The cache as a decode step finds it, once its token is appended.

    Args:
      keys, values: [B,T,K,D]; queries: [B,N,H,D], of the prompt's last N tokens.
      lengths: int32 [B], tokens of each sequence, the new one included.
    """
    batch, _, kv_heads, head_dim = keys.shape
    prompt, one = lengths - 1, jnp.ones((batch,), jnp.int32)
    last = [jnp.take_along_axis(x, prompt[:, None, None, None], axis=1) for x in (keys, values)]
    if isinstance(config, RaBitQConfig):
        cache = init_layer_cache(batch, capacity, kv_heads, head_dim, config, dtype=keys.dtype)
        cache = attention.build_codes(append(cache, keys, values, prompt), config)
        return append(cache, *last, one)
    shape = CacheShape(
        batch=batch, capacity=capacity, num_heads=queries.shape[2], num_kv_heads=kv_heads, head_dim=head_dim,
        dtype=keys.dtype,
    )  # fmt: skip
    cache = append(init_selector_cache(shape, config), keys, values, prompt)
    observed = jnp.full((batch,), queries.shape[1], jnp.int32)
    state = config.build(config.observe(cache.state, cache, queries, observed), cache)
    return append(dataclasses.replace(cache, state=state), *last, one)


@functools.partial(jax.jit, static_argnames=("config",))
def attend(query, cache: LayerCache, *, config: RaBitQConfig | Selector):
    """Output [B,K,G,D], selection and bytes read of queries [B,K,G,D]."""
    scale = query.shape[-1] ** -0.5
    if isinstance(config, RaBitQConfig):
        out, selection, stats = attention.attend_selected(query, cache, config, scale, jax.random.key(0))
        return out, selection, stats.bytes_read
    step = Step(softmax_scale=scale, new_tokens=jnp.ones_like(cache.length))
    attended = attention.attend_with_selector(query, cache, step)[1]
    return attended.out, attended.selection, attended.bytes_read


if __name__ == "__main__":
    main()
