"""Ask a small trained model for a fact in a long text, densely and with a RaBitQ cache, and show what each read for it.

    python -m demo.run --key "the blue door" --value 7294013

The text is Python's standard library, the model the one that comes with rabitq-jax (models/retriever).
"""

from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.facts import single
from benchmarks.quality.haystack import standard_library
from benchmarks.quality.tasks import Facts, hide
from benchmarks.record import commit_option, write_text
from models import RETRIEVER, load_pretrained
from rabitq_jax import Generation, RaBitQConfig, generate

PICTURE = Path(__file__).parent / "out" / "heads.png"
ROW = "{:<26}{:>16}{:>16}"
BAR = 40


@click.command(help=__doc__.split("\n")[0])
@click.option("--key", default="the blue door", show_default=True, help="What the fact is about.")
@click.option("--value", default="7294013", show_default=True, help="What the model has to find.")
@click.option("--prompt-tokens", default=16384, show_default=True, help="Length of the text; a token is a byte.")
@click.option("--top-p", default=0.95, show_default=True, help="Share of the attention to keep.")
@click.option("--seed", default=0, show_default=True, help="Where the fact stands.")
@click.option("--record", is_flag=True, help="Write what is printed to benchmarks/results/demo.txt too.")
@commit_option
def main(key: str, value: str, prompt_tokens: int, top_p: float, seed: int, record: bool, commit: str) -> None:
    model, tokenizer = load_pretrained(RETRIEVER, dtype=jnp.float32, progress=False)
    fact = single("number" if value.isdecimal() else "word", key, value)
    prompt = hide(standard_library("test"), Facts(asked=fact), seed, prompt_tokens - 1)
    ids = tokenizer.encode(prompt)
    place = prompt.index(fact.needles[0]) / len(prompt)
    about = [
        f"{len(ids):,} tokens of Python's sources; {place:.0%} into them stands: {fact.needles[0]}",
        fact.question,
    ]
    click.echo("\n".join(about))
    # Every layer selects: the model has but five.
    config = RaBitQConfig(top_p=top_p)
    line_end = tokenizer.encode("\n", add_special_tokens=False)
    runs = []
    for name, choice in (("dense", None), ("RaBitQ", config)):
        click.echo(f"{name}:", err=True)
        out = generate(
            model, ids, choice,
            max_new_tokens=len(value) + 8, key=jax.random.key(0), eos_token_ids=line_end, progress=True,
        )  # fmt: skip
        runs.append(out)
    answers = [tokenizer.decode(out.tokens[0, : out.lengths[0]]) for out in runs]
    kept = kept_by_head(runs[1])
    results = [*table(*runs, answers, top_p), "", *bars(kept.mean(axis=0))]
    click.echo("\n".join(results))
    if record:
        write_text("demo.txt", "\n".join([*about, *results]), commit=commit)
    click.echo(f"\npicture: {draw(kept, answers[1], top_p)}")


def table(dense: Generation, sparse: Generation, answers: list[str], top_p: float) -> list[str]:
    """Lines of the table."""

    def row(label, value, form):
        return ROW.format(label, *(form.format(value(out)) for out in (dense, sparse)))

    return [
        ROW.format("", "dense", f"p = {top_p:g}"),
        ROW.format("answer", *(answer.strip() for answer in answers)),
        row("tokens attended", lambda out: kept_by_head(out).mean(), "{:.1%}"),
        row("bytes of the cache read", bytes_read, "{:.1%}"),
        row("decoding, tokens/s", lambda out: out.lengths[0] / out.decode_seconds, "{:,.1f}"),
    ]


def bytes_read(out: Generation) -> float:
    """Share of dense attention's, mean over the answer's tokens."""
    return out.stats.bytes_read_fraction[0, : out.lengths[0]].mean()


def kept_by_head(out: Generation) -> np.ndarray:
    """Share of tokens attended [N,L,K], at each of the answer's tokens."""
    steps = int(out.lengths[0])
    return out.stats.kept[0, :steps] / out.stats.length[0, :steps, None, None]


def bars(kept: np.ndarray) -> list[str]:
    """A bar for each layer and kv head, as long as its share of tokens [L,K]."""
    lines = ["tokens attended by each kv head"]
    for (layer, head), share in np.ndenumerate(kept):
        bar = "█" * round(BAR * share) or "▏"
        lines.append(f"layer {layer} head {head}  {bar:<{BAR}} {share:6.1%}")
    return lines


def draw(kept: np.ndarray, answer: str, top_p: float) -> Path:
    """Write a picture of the share of tokens [N,L,K] that each head attends after each character of the answer."""
    # An extra: loaded last, so that the numbers are there without it.
    import matplotlib.pyplot as plt

    steps, layers, heads = kept.shape
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    image = axis.imshow(
        np.log10(kept.reshape(steps, -1).T.clip(1e-3)), vmin=-3, vmax=0, aspect="auto", interpolation="none"
    )
    axis.set_yticks(range(layers * heads), [f"layer {i // heads} head {i % heads}" for i in range(layers * heads)])
    axis.set_xticks(range(steps), [{" ": "space", "\n": "end"}.get(character, character) for character in answer])
    axis.set(xlabel="read for the token after", title=f"Share of the cache's tokens attended, p = {top_p:g}")
    bar = figure.colorbar(image, ticks=[-3, -2, -1, 0])
    bar.ax.set_yticklabels(["0.1%", "1%", "10%", "100%"])
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)
    return PICTURE.relative_to(Path.cwd()) if PICTURE.is_relative_to(Path.cwd()) else PICTURE


if __name__ == "__main__":
    main()
