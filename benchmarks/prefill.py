"""Time of reading a prompt, by a model of Llama-3.1-8B's shape with random weights, and of making its codes.

    python -m benchmarks.prefill --tokens 32768         # writes benchmarks/results/prefill.json

The rate of useful operations, those of the matrix products and of causal attention, is compared with that of a large
bfloat16 product in the same run.
"""

import dataclasses
import time

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from benchmarks.checks import check, relative_error
from benchmarks.make_checkpoint import SHAPES
from benchmarks.quantizing import quantizing_us
from benchmarks.record import commit_option, write_row
from benchmarks.suite import announce_device
from models import Llama, LlamaConfig, causal_attention
from rabitq_jax import Cache, RaBitQConfig, init_cache
from rabitq_jax._dispatch import on_gpu
from rabitq_jax.cache import round_capacity
from rabitq_jax.decoding import ModelDefinition
from rabitq_jax.generation import feed_prompts

REPEATS = 2
CHECKED_TOKENS = 512


def operations(config: LlamaConfig, tokens: int) -> int:
    """Floating-point operations of a prompt: two for each weight of the layers and token, and attention's products,
    queries with keys and weights with values, over the tokens before. The head, of one token, is left out."""
    heads = config.num_heads * config.head_dim
    projections = config.hidden_size * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
    weights = projections + 3 * config.hidden_size * config.mlp_size
    return config.num_layers * (2 * weights * tokens + 2 * heads * tokens * (tokens + 1))


def measure(model: Llama, config: RaBitQConfig, matmul_rate: float, tokens: int) -> dict:
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens, np.int32)
    cache, _ = read_prompt(model, prompt, config)
    microseconds = []
    for _ in range(REPEATS):
        del cache  # Two do not fit beside the weights.
        begin = time.perf_counter()
        cache, _ = read_prompt(model, prompt, config)
        microseconds.append(1e6 * (time.perf_counter() - begin))
    wall = timing.Times.of(microseconds)
    layer = cache.layers[-1]
    blocks = layer.quantized // config.interval
    one_layer = quantizing_us(layer, config, jnp.zeros_like(blocks), blocks, max_blocks=tokens // config.interval)
    codes = one_layer * (model.config.num_layers - config.dense_layers)
    rate = 1e6 * operations(model.config, tokens) / wall.median
    return {
        "wall_us": dataclasses.asdict(wall),
        "tokens_per_second": 1e6 * tokens / wall.median,
        "operations": operations(model.config, tokens),
        "tflop_per_s": rate / 1e12,
        "matmul_tflop_per_s": matmul_rate / 1e12,
        "share_of_matmul_rate": rate / matmul_rate,
        "codes_us": codes,
        "codes_share": codes / wall.median,
    }


def read_prompt(model: Llama, prompt: np.ndarray, config: RaBitQConfig) -> tuple[Cache, jax.Array]:
    """A new cache with the prompt, as `generate` feeds it, and the last hidden state [1,hidden]."""
    definition, params = ModelDefinition.split(model)
    cache = init_cache(model.config, 1, round_capacity(len(prompt), config), config, dtype=model.dtype)
    hidden = jnp.zeros((1, model.config.hidden_size), model.dtype)
    return jax.block_until_ready(
        feed_prompts(definition, params, cache, hidden, [prompt], np.zeros(1, np.int32), config=config)
    )


def check_against_attention(config: RaBitQConfig) -> float:
    """Error of a small model's last hidden state against plain causal attention."""
    model = Llama(SHAPES["demo"], rngs=nnx.Rngs(0))
    prompt = np.arange(CHECKED_TOKENS, dtype=np.int32) % model.config.vocab_size
    _, got = read_prompt(model, prompt, config)
    position, length = jnp.arange(CHECKED_TOKENS)[None], jnp.array([CHECKED_TOKENS])
    want, _, _ = model(prompt[None], position, length, (None,) * model.config.num_layers, causal_attention)
    return check("a prefill", relative_error(got, want[:, -1]), 0.05)


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", "name", type=click.Choice(list(SHAPES)), help="Default: llama-3.1-8b; without a GPU, demo.")
@click.option("--tokens", multiple=True, type=int, help="May be repeated; default: 32768; without a GPU, 1024.")
@commit_option
def main(name: str, tokens: tuple[int, ...], commit: str) -> None:
    announce_device()
    name = name or ("llama-3.1-8b" if on_gpu() else "demo")
    config = RaBitQConfig()
    error = check_against_attention(config)
    rate = timing.matmul_rate()
    model = Llama(SHAPES[name], rngs=nnx.Rngs(0))
    for count in tokens or ((32768,) if on_gpu() else (1024,)):
        row = {"case": f"{name} T{count}", "model": name, "tokens": count, "error": error}
        row |= measure(model, config, rate, count)
        write_row("prefill.json", row, commit=commit)
        click.echo(
            f"{row['case']}: {row['wall_us']['median'] / 1e6:.3f} s, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['tflop_per_s']:.3g} TFLOP/s, {row['share_of_matmul_rate']:.0%} of a matrix product's; "
            f"codes {row['codes_share']:.2%} of it"
        )


if __name__ == "__main__":
    main()
