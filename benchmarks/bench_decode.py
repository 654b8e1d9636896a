"""Time of one layer's decode step, dense and with a RaBitQ cache, and of the kernels inside.

    python -m benchmarks.bench_decode                  # writes benchmarks/results/decode.json

Keys, values and queries are random; the queries are scaled so that the logits have a standard deviation of `sharpness`
nats, which sets how few tokens hold the mass. A step's time is that of a jitted loop of steps over a donated cache,
divided by their number: it carries the loop's own 5 to 10 us. Kernel times are CUPTI's, of one call.
"""

import dataclasses
import statistics
import time

import click
import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from benchmarks.record import commit_option, write_result
from benchmarks.shapes import Shape
from rabitq_jax import attention
from rabitq_jax.cache import LayerCache, init_layer_cache
from rabitq_jax.codes import update_codes
from rabitq_jax.config import RaBitQConfig

SHAPES = [Shape(batch, 8, 4, tokens, 128) for batch in (1, 8) for tokens in (8192, 32768, 131072)]
SHAPES.insert(3, Shape(1, 8, 4, 1048576, 128))
STEPS, REPEATS = 30, 5


def make_cache(shape: Shape, config: RaBitQConfig | None) -> LayerCache:
    """A cache filled but for room for the timed steps."""
    cache = init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, config)
    keys = jax.random.split(jax.random.key(0))
    held, values = (jax.random.normal(key, cache.keys.shape, cache.keys.dtype) for key in keys)
    length = jnp.full((shape.batch,), shape.tokens - STEPS * (REPEATS + 1), jnp.int32)
    cache = dataclasses.replace(cache, keys=held, values=values, length=length)
    if config is None or cache.codes is None:
        return cache
    quantized = config.quantized_length(length)
    codes = update_codes(
        held, cache.codes, jnp.zeros_like(length), quantized // config.interval,
        interval=config.interval, max_blocks=shape.tokens // config.interval,
    )  # fmt: skip
    return dataclasses.replace(cache, codes=codes, quantized=quantized)


def make_step_inputs(shape: Shape, sharpness: float):
    keys = jax.random.split(jax.random.key(1), 3)
    heads = shape.kv_heads * shape.group
    query = sharpness * jax.random.normal(keys[0], (shape.batch, heads, shape.head_dim), jnp.bfloat16)
    new = (shape.batch, shape.kv_heads, shape.head_dim)
    return query, jax.random.normal(keys[1], new, jnp.bfloat16), jax.random.normal(keys[2], new, jnp.bfloat16)


def median_seconds(run) -> float:
    """Seconds of a step in a loop of STEPS: the median of REPEATS loops, after one that compiles."""
    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - begin) / STEPS)
    return statistics.median(seconds[1:])


def time_steps(inputs, cache: LayerCache, config: RaBitQConfig | None):
    """Median seconds of a step, and the stats of the last one."""

    def step(i, state):
        # The next query hangs on the last output, so that steps cannot overlap.
        query, cache, _ = state
        out, cache, stats = attention.decode(
            query, *inputs[1:], cache, config, prng_key=jax.random.fold_in(jax.random.key(2), i)
        )
        return jnp.where(jnp.isnan(out), out, query), cache, stats

    def loop(query, cache):
        state = step(0, (query, cache, None))
        return jax.lax.fori_loop(1, STEPS, step, state)

    run = jax.jit(loop, donate_argnames="cache")
    state = [cache, None]

    def again():
        _, *state[:] = run(inputs[0], state[0])
        return state

    return median_seconds(again), state[1]


def time_cudnn(query, shape: Shape) -> float:
    """Median seconds of cuDNN's attention over the whole context, nothing appended."""
    keys = jax.random.split(jax.random.key(3))
    held = (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
    key, value = (jax.random.normal(k, held, jnp.bfloat16) for k in keys)

    def loop(query, key, value):
        def step(_, query):
            out = jax.nn.dot_product_attention(query[:, None], key, value, implementation="cudnn")[:, 0]
            return jnp.where(jnp.isnan(out), out, query)

        return jax.lax.fori_loop(0, STEPS, step, query)

    run = jax.jit(loop)
    return median_seconds(lambda: run(query, key, value))


def time_kernels(inputs, cache: LayerCache, config: RaBitQConfig) -> dict[str, float]:
    """Microseconds of every kernel of one attention over a selection."""
    _, kv_heads, _, head_dim = cache.keys.shape
    grouped = inputs[0].reshape(inputs[0].shape[0], kv_heads, -1, head_dim)
    attend = jax.jit(lambda q, c: attention.attend_selected(q, c, config, head_dim**-0.5, jax.random.key(2)))
    _, timings = profiler.measure(attend, aggregate=False)(grouped, cache)
    kernels: dict[str, float] = {}
    for name, milliseconds in timings or []:
        kernels[name] = kernels.get(name, 0.0) + 1000 * milliseconds
    return kernels


@click.command(help=__doc__.split("\n")[0])
@click.option("--sharpness", default=4.0, show_default=True)
@click.option("--top-p", default=0.95, show_default=True)
@commit_option
def main(sharpness: float, top_p: float, commit: str) -> None:
    if jax.default_backend() != "gpu":
        raise click.ClickException("this benchmark needs a GPU")
    config = RaBitQConfig(top_p=top_p)
    rows = []
    for shape in SHAPES:
        inputs = make_step_inputs(shape, sharpness)
        dense, _ = time_steps(inputs, make_cache(shape, None), None)
        sparse, stats = time_steps(inputs, make_cache(shape, config), config)
        cudnn = time_cudnn(inputs[0], shape)
        row = {
            "shape": str(shape),
            "dense_us": 1e6 * dense,
            "cudnn_us": 1e6 * cudnn,
            "rabitq_us": 1e6 * sparse,
            "kept": float(stats.kept.mean() / stats.length.mean()),
            "bytes_read": float(stats.bytes_read.sum() / stats.bytes_dense.sum()),
            "kernels_us": time_kernels(inputs, make_cache(shape, config), config),
        }
        rows.append(row)
        click.echo(
            f"{row['shape']:<24} dense {row['dense_us']:7.1f}   cuDNN {row['cudnn_us']:7.1f}   RaBitQ "
            f"{row['rabitq_us']:7.1f} us   kept {row['kept']:.2%}   bytes {row['bytes_read']:.2%}"
        )
    write_result("decode.json", {"sharpness": sharpness, "top_p": top_p, "steps": STEPS, "rows": rows}, commit=commit)


if __name__ == "__main__":
    main()
