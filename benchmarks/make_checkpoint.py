"""A Llama checkpoint in Hugging Face format, with random weights whose attention is peaked.

Plain random projections give logits of about unit spread, hence attention that is nearly flat over a long context, and
Top-p would have to keep most of it. Trained heads are peaked. So the query and key projections are made larger: with an
input of unit mean square, their outputs have standard deviation `sharpness`, and the logits q.k / sqrt(head_dim) about
`sharpness` squared.

    python -m benchmarks.make_checkpoint FOLDER
"""

from pathlib import Path

import click
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from benchmarks.byte_tokenizer import byte_tokenizer, save_byte_tokenizer
from models import Llama, LlamaConfig, RopeConfig, save_pretrained

SHAPES = {
    "demo": LlamaConfig(
        vocab_size=258,
        hidden_size=256,
        mlp_size=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        norm_eps=1e-5,
        max_position=131072,
        rope=RopeConfig(theta=500000.0),
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        mlp_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        norm_eps=1e-5,
        max_position=131072,
        rope=RopeConfig(kind="llama3", theta=500000.0, factor=32.0, original_max_position=8192),
        tie_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        mlp_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        max_position=131072,
        rope=RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_max_position=8192),
    ),
}


def make_checkpoint(
    folder: str | Path, config: LlamaConfig, *, dtype=jnp.float32, sharpness: float = 2.0, seed: int = 0
) -> Path:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files; return the folder."""
    folder = Path(folder)
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(seed))
    tokenizer = byte_tokenizer()
    _rescale(model, sharpness)
    head = model.embed_tokens if config.tie_embeddings else model.lm_head
    # The score of zeros is never the largest of many, so that greedy text is printable and does not end early.
    columns = jnp.isin(jnp.arange(config.vocab_size), jnp.array(_printable_ids(tokenizer)))
    head.weight.set_value(head.weight[...] * (columns[:, None] if config.tie_embeddings else columns))
    save_pretrained(model, folder)
    save_byte_tokenizer(folder)
    return folder


def _rescale(model: Llama, sharpness: float) -> None:
    """Give every projection outputs of unit mean square for such inputs, times `sharpness` for queries and keys."""
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        if len(parameter.shape) == 2:
            weight = parameter.get_value()
            spread = jnp.ones(())
            if "qkv_proj" in path:
                values = model.config.num_kv_heads * model.config.head_dim
                spread = jnp.where(jnp.arange(weight.shape[1]) < weight.shape[1] - values, sharpness, 1.0)
            inputs = 1 if "embed_tokens" in path else weight.shape[0]
            parameter.set_value((weight * (spread / inputs**0.5 / jnp.std(weight))).astype(weight.dtype))


def _printable_ids(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.encode(chr(code), add_special_tokens=False).ids[0] for code in range(32, 127)]


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="demo", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--sharpness", default=2.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, shape: str, dtype: str, sharpness: float, seed: int) -> None:
    click.echo(make_checkpoint(folder, SHAPES[shape], dtype=jnp.dtype(dtype), sharpness=sharpness, seed=seed))


if __name__ == "__main__":
    main()
