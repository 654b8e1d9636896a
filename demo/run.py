"""Decode one long prompt twice, densely and with a RaBitQ cache, and show the results side by side.

    python -m demo.run

The prompt is the beginning of the Constitution of the United States; the checkpoint is made here, with random weights
whose attention is peaked (demo/make_checkpoint.py). So the text that comes out means nothing: what is compared is what
was read to make it.
"""

from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.make_checkpoint import SHAPES, make_checkpoint
from models import load_pretrained
from rabitq_jax import Generation, RaBitQConfig, generate

HERE = Path(__file__).parent
ROW = "{:<34}{:>12}{:>12}"


@click.command(help=__doc__.split("\n")[0])
@click.option("--prompt-tokens", default=16384, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--top-p", default=0.95, show_default=True)
def main(prompt_tokens: int, new_tokens: int, top_p: float) -> None:
    model, tokenizer = load_pretrained(make_checkpoint(HERE / "out" / "checkpoint", SHAPES["demo"]), dtype=jnp.float32)
    prompt = tokenizer.encode((HERE / "constitution.txt").read_text(encoding="utf-8"))[:prompt_tokens]
    config = RaBitQConfig(top_p=top_p, dense_layers=1)
    click.echo(f"{len(prompt):,} prompt tokens, {new_tokens} new ones, greedy, on {jax.devices()[0].device_kind}")
    runs = []
    for name, choice in (("dense", None), ("RaBitQ", config)):
        click.echo(f"{name}:", err=True)
        runs.append(generate(model, prompt, choice, max_new_tokens=new_tokens, key=jax.random.key(0), progress=True))
    report(*runs, config)
    for name, out in zip(("dense", "RaBitQ"), runs, strict=True):
        click.echo(f"\n{name}: {tokenizer.decode(out.tokens[0, : out.lengths[0]])}")


def report(dense: Generation, sparse: Generation, config: RaBitQConfig) -> None:
    """Print the table."""

    def row(label, value, form):
        click.echo(ROW.format(label, *(form.format(value(out)) for out in (dense, sparse))))

    equal = dense.tokens[0] == sparse.tokens[0]
    prefix = len(equal) if equal.all() else int(np.argmin(equal))
    click.echo("\n" + ROW.format("", "dense", f"p = {config.top_p:g}"))
    row("prefill, tokens/s", lambda out: (out.stats.length[0, 0] - 1) / out.prefill_seconds, "{:,.0f}")
    row("decode, tokens/s", lambda out: out.lengths[0] / out.decode_seconds, "{:,.1f}")
    for layer in range(sparse.stats.kept.shape[2]):
        row(
            f"tokens attended in layer {layer}",
            lambda out, layer=layer: out.stats.kept[0, :, layer].mean(-1).sum() / out.stats.length[0].sum(),
            "{:.1%}",
        )
    row("bytes of the cache read", lambda out: out.stats.bytes_read_fraction[0, : out.lengths[0]].mean(), "{:.1%}")
    row("cache, MB", lambda out: out.cache.nbytes / 1e6, "{:,.1f}")
    click.echo(ROW.format("tokens equal to dense, from the first", "", prefix))


if __name__ == "__main__":
    main()
