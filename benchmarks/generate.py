"""Rates of `generate` on a checkpoint, dense and with a RaBitQ cache, and what was read for it.

    python -m benchmarks.make_checkpoint FOLDER --shape llama-3.2-1b --dtype bfloat16
    python -m benchmarks.generate FOLDER           # writes benchmarks/results/generate.json

Each kind of decoding runs twice; the second run, which compiles nothing, counts.
"""

import click
import jax
import jax.numpy as jnp

from benchmarks.quality.haystack import standard_library
from benchmarks.record import commit_option, write_result
from models import load_pretrained
from rabitq_jax import RaBitQConfig, generate

SHAPE = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")


@click.command(help=__doc__.split("\n")[0])
@click.argument("model")
@click.option("--prompt-tokens", default=32768, show_default=True)
@click.option("--new-tokens", default=128, show_default=True)
@click.option("--top-p", default=0.95, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@commit_option
def main(model: str, prompt_tokens: int, new_tokens: int, top_p: float, dtype: str, commit: str) -> None:
    decoder, tokenizer = load_pretrained(model, dtype=jnp.dtype(dtype))
    # No token has more than 8 characters on average.
    prompt = tokenizer.encode(standard_library("test")[: 8 * prompt_tokens].decode())[:prompt_tokens]
    rows = []
    for name, config in (("dense", None), ("rabitq", RaBitQConfig(top_p=top_p))):
        click.echo(name)
        for _ in range(2):
            out = generate(decoder, prompt, config, max_new_tokens=new_tokens, key=jax.random.key(0), eos_token_ids=())
        rows.append(
            {
                "decoding": name,
                "prefill_tokens_per_second": prompt_tokens / out.prefill_seconds,
                "decode_tokens_per_second": new_tokens / out.decode_seconds,
                "kept": float(out.stats.kept_fraction.mean()),
                "bytes_read": float(out.stats.bytes_read_fraction.mean()),
            }
        )
        click.echo("  ".join(f"{key} {value:,.4g}" for key, value in rows[-1].items() if key != "decoding"))
    shape = {name: getattr(decoder.config, name) for name in SHAPE}
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "dtype": dtype, "top_p": top_p}
    write_result("generate.json", {"model": shape, **sizes, "rows": rows}, commit=commit)


if __name__ == "__main__":
    main()
