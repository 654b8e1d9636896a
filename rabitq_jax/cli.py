"""The command line: `rabitq-jax generate`, `selectors`, `calibrate` and `inspect`."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import RETRIEVER, Llama, LlamaConfig, TextStream, Tokenizer, load_pretrained
from models.folder import read_config
from models.pretrained import find_folder
from rabitq_jax.cache import init_cache, init_codes, round_capacity
from rabitq_jax.config import RaBitQConfig, SelectionRule, Tail
from rabitq_jax.generation import Generation, generate
from rabitq_jax.sampling import Sampling
from rabitq_jax.selectors import SELECTORS, Selector, make_selector
from rabitq_jax.selectors.arguments import parse_arguments
from rabitq_jax.selectors.double_sparsity_calibration import calibrate

DEFAULT = RaBitQConfig()
DTYPES = ("bfloat16", "float16", "float32")


def main() -> None:
    """Run the command line; what is wrong with a checkpoint, a prompt or an option is told in one line."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
        try:
            commands(prog_name="rabitq-jax")
        except ValueError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rabitq-jax")
def commands() -> None:
    """Long-context decoding with a RaBitQ cache."""


model_option = click.option(
    "--model",
    default=str(RETRIEVER),
    help="Folder of a Llama checkpoint in Hugging Face format, or a hub id (owner/name). By default the small "
    "retrieval model that comes with rabitq-jax, which answers questions of one form: see models/retriever/README.md.",
)
dtype_option = click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)


@commands.command("generate")
@model_option
@click.option(
    "--prompt-file", required=True, type=click.File(encoding="utf-8"), help="Text file; - for standard input."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--top-p", default=DEFAULT.top_p, show_default=True, help="Share of the attention mass to keep, in (0, 1]."
)
@click.option(
    "--selection", type=click.Choice(get_args(SelectionRule)), default=DEFAULT.selection, show_default=True,
    help="What p is a share of: the estimated attention (plain), the true attention on average (debiased), or in each "
    "head and step but for a share of them (certified).",
)  # fmt: skip
@click.option(
    "--failure-rate", default=DEFAULT.failure_rate, show_default=True, help="That share, for --selection certified."
)
@click.option(
    "--tail", type=click.Choice(get_args(Tail)), default=DEFAULT.tail, show_default=True,
    help="What stands for the attention left out: nothing, or the mean value (not with plain selection).",
)  # fmt: skip
@click.option("--dense", is_flag=True, help="Attend to everything, without codes.")
@click.option(
    "--selector", type=click.Choice(["rabitq", *SELECTORS]),
    help="Another retrieval method than RaBitQ; `rabitq-jax selectors` lists them.",
)  # fmt: skip
@click.option(
    "--selector-args", default="", metavar="NAME=VALUE,...", help="Its arguments, such as page=16,budget=1024."
)
@click.option(
    "--dense-layers", default=DEFAULT.dense_layers, show_default=True, help="First layers that attend densely."
)
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message, by the checkpoint's chat template.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--sample-top-k", type=int, help="Draw among the k most likely tokens.")
@click.option("--sample-top-p", type=float, help="Draw among the tokens that hold this share of the probability.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of sampling and rounding.")
@click.option("--ignore-eos", is_flag=True, help="Do not stop at an end-of-text token.")
@dtype_option
def generate_command(
    model, prompt_file, max_new_tokens, top_p, selection, failure_rate, tail, dense, selector, selector_args,
    dense_layers, chat, temperature, sample_top_k, sample_top_p, seed, ignore_eos, dtype,
) -> None:  # fmt: skip
    """Continue a text. The text goes to standard output, everything else to standard error."""
    choices = dict(top_p=top_p, selection=selection, failure_rate=failure_rate, tail=tail, dense_layers=dense_layers)
    config = choose_method(choices, dense=dense, selector=selector, selector_args=selector_args)
    sampling = Sampling(temperature=temperature, top_k=sample_top_k, top_p=sample_top_p)
    decoder, tokenizer = load_pretrained(model, dtype=jnp.dtype(dtype))
    prompt = encode_prompt(tokenizer, prompt_file.read(), chat=chat)
    printer = Printer(tokenizer)
    out = generate(
        decoder, prompt, config,
        max_new_tokens=max_new_tokens, key=jax.random.key(seed), sampling=sampling,
        eos_token_ids=() if ignore_eos else tokenizer.eos_token_ids, on_token=printer, progress=True,
    )  # fmt: skip
    printer.finish()
    click.echo(summarize(out, len(prompt)), err=True)
    if not out.finite.all():
        raise ValueError("NaN or infinity came up in attention or logits: the text means nothing")


def choose_method(
    choices: dict[str, Any], *, dense: bool, selector: str | None, selector_args: str
) -> RaBitQConfig | Selector | None:
    """What the options say: RaBitQ's choices, dense attention, or a method with its own arguments.

    Raises:
      ValueError: they contradict each other.
    """
    if selector is None:
        if selector_args:
            raise ValueError(f"--selector-args needs --selector, got {selector_args!r} alone")
        return None if dense else RaBitQConfig(**choices)
    changed = [name for name, value in choices.items() if value != getattr(DEFAULT, name)]
    others = [f"--{name.replace('_', '-')}" for name in [*changed, *["dense"] * dense]]
    if others:
        raise ValueError(f"--selector takes all of a method's options in --selector-args, got {', '.join(others)} too")
    return make_selector(selector, **parse_arguments(selector_args))


def encode_prompt(tokenizer: Tokenizer, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt."""
    return tokenizer.apply_chat_template([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)


class Printer:
    """Prints the text of one sequence as its tokens come."""

    def __init__(self, tokenizer: Tokenizer):
        self._stream = TextStream(tokenizer)

    def __call__(self, step: int, tokens: np.ndarray) -> None:
        if tokens[0] >= 0:
            click.echo(self._stream.feed(tokens[0]), nl=False)

    def finish(self) -> None:
        click.echo(self._stream.finish())


def summarize(out: Generation, prompt_tokens: int) -> str:
    """The closing line: tokens, rates, how much of the cache was attended and read, and what was verified of it."""
    new_tokens, stats = int(out.lengths[0]), out.stats
    layers, kv_heads = stats.kept.shape[2:]
    kept = stats.kept.sum() / (stats.length.sum() * layers * kv_heads)
    read = stats.bytes_read.sum() / stats.bytes_dense.sum()
    verified = ""
    if stats.verified is not None and stats.certified is not None:
        captured, certified = (x[0, :new_tokens].mean() for x in (stats.verified, stats.certified))
        verified = f", verified {captured:.2%} of the attention, p certified in {certified:.2%} of head-steps"
    prefill_rate, decode_rate = prompt_tokens / out.prefill_seconds, new_tokens / out.decode_seconds
    return (
        f"{prompt_tokens:,} prompt tokens, {new_tokens:,} new | prefill {prefill_rate:,.0f} tokens/s, "
        f"decode {decode_rate:,.1f} tokens/s (compiling, {out.compile_seconds:.1f} s, apart) | "
        f"kept {kept:.1%} of tokens, read {read:.1%} of dense attention's bytes{verified}"
    )


@commands.command("selectors")
@click.option("--head-dim", type=click.IntRange(min=1), default=128, show_default=True)
@dtype_option
def selectors_command(head_dim, dtype) -> None:
    """List the retrieval methods: bytes that scoring reads of each cached token and kv head, and what they are.

    Keys and values of the tokens that are then attended come on top.
    """
    itemsize = jnp.dtype(dtype).itemsize
    codes = jax.eval_shape(lambda: init_codes(1, round_capacity(1, DEFAULT), 1, head_dim, DEFAULT, None))
    rabitq_bytes = codes.bytes_per_token + codes.centroid_bytes_per_token
    click.echo(f"{'rabitq':18}{rabitq_bytes:7.1f}  {describe(RaBitQConfig)}")
    for name, kind in SELECTORS.items():
        click.echo(f"{name:18}{kind().bytes_per_token(head_dim, itemsize):7.1f}  {describe(kind)}")
    row = 2 * head_dim * itemsize
    click.echo(f"{'':18}{row:7.1f}  (key and value of a token in {dtype}, {head_dim} dimensions)")


def describe(kind: type) -> str:
    """The first line of a method's module."""
    if kind is RaBitQConfig:
        return "RaBitQ: one bit per key dimension, and Top-p of the estimated attention (arXiv 2606.31519)."
    return (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]


@commands.command("calibrate")
@model_option
@click.option("--text-file", required=True, type=click.File(encoding="utf-8"), help="A text; - for standard input.")
@click.option("--channels", type=click.IntRange(min=8), default=16, show_default=True, help="Of each kv head.")
@click.option("--tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Of the text, at most.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="File to write, in JSON.")
@dtype_option
def calibrate_command(model, text_file, channels, tokens, output, dtype) -> None:
    """Find the channels that matter in a text, for --selector double-sparsity --selector-args calibrated=FILE."""
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output must be in a folder that exists, got {output}")
    decoder, tokenizer = load_pretrained(model, dtype=jnp.dtype(dtype))
    text = tokenizer.encode(text_file.read())[:tokens]
    found = calibrate(decoder, text, channels=channels)
    output.write_text(json.dumps({"tokens": len(text), "channels": found}) + "\n", encoding="utf-8")
    click.echo(f"{channels} channels of {len(found)} layers x {len(found[0])} kv heads, from {len(text):,} tokens")


@commands.command("inspect")
@model_option
@click.option("--context", type=click.IntRange(min=1), help="Tokens in the cache; the model's range by default.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@dtype_option
def inspect_command(model, context, batch, dtype) -> None:
    """Show a model, the size of its cache for a context, and what the codes add to it."""
    config = read_config(find_folder(model))
    decoder = Llama.abstract(config, dtype=jnp.dtype(dtype))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder)))
    click.echo(f"model         {model}")
    click.echo(
        f"parameters    {parameters / 1e9:,.3f} billion, {gigabytes(parameters * decoder.dtype.itemsize)} in {dtype}"
    )
    click.echo(f"layers        {config.num_layers}, hidden {config.hidden_size}, MLP {config.mlp_size}")
    click.echo(
        f"heads         {config.num_heads} query, {config.num_kv_heads} key-value, of {config.head_dim} dimensions"
    )
    click.echo(f"vocabulary    {config.vocab_size:,}{', tied embeddings' if config.tie_embeddings else ''}")
    click.echo(f"positions     {config.max_position:,}, rope {config.rope.kind}, theta {config.rope.theta:g}")

    capacity = round_capacity(context or config.max_position, DEFAULT)
    dense, coded = (cache_bytes(config, batch, capacity, rabitq, decoder.dtype) for rabitq in (None, DEFAULT))
    click.echo(f"cache         {gigabytes(dense)} for {batch} x {capacity:,} tokens in {dtype}")
    click.echo(f"codes         {gigabytes(coded - dense)} more, {(coded - dense) / dense:.1%} of the cache")


def cache_bytes(config: LlamaConfig, batch: int, capacity: int, rabitq: RaBitQConfig | None, dtype) -> int:
    """Bytes of a cache that is not made."""
    cache = jax.eval_shape(lambda: init_cache(config, batch, capacity, rabitq, dtype=dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3f} GB"
