"""The tables and the picture of README.md, from the files in benchmarks/results alone.

python -m benchmarks.report          # rewrites README.md between its markers, and results/decode.png
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.record import RESULTS

README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    decode, generate = (json.loads((RESULTS / name).read_text()) for name in ("decode.json", "generate.json"))
    plot_decode(decode, RESULTS / "decode.png")
    text = README.read_text(encoding="utf-8")
    for marker, content in (("headline", headline(decode)), ("results", results(decode, generate))):
        block = f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->"
        text = re.sub(rf"<!-- {marker} -->.*?<!-- /{marker} -->", lambda _, block=block: block, text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


def sizes(row: dict[str, Any]) -> tuple[int, int]:
    """Batch and tokens of a row's shape."""
    batch, tokens = re.match(r"B(\d+)-.*T(\d+)-", row["shape"]).groups()
    return int(batch), int(tokens)


def headline(decode: dict[str, Any]) -> str:
    row = next(row for row in decode["rows"] if sizes(row) == (8, 131072))
    return (
        f"One attention layer of Llama-3.1-8B's shape, decoding 8 sequences of 128K tokens on an {decode['environment']['device']}: "
        f"**{row['rabitq_us']:.0f} µs instead of {row['dense_us']:.0f} µs**, {row['kept']:.1%} of the tokens attended, "
        f"{row['bytes_read']:.1%} of the bytes read ([how it was measured](#results))."
    )


def results(decode: dict[str, Any], generate: dict[str, Any]) -> str:
    lines = [
        f"**One decode step of one layer** (32 query heads, 8 kv heads, 128 dimensions, bfloat16, p = {decode['top_p']:g}; "
        f"random keys, queries whose logits deviate by {decode['sharpness']:g} nats; {provenance(decode, 'decode.json')}). "
        "Dense is XLA's attention over the whole cache. Both times include appending the token; that of RaBitQ, all of "
        "query rotation, scores, selection, attention and quantization.",
        "",
        "| batch | tokens | dense, µs | RaBitQ, µs | ratio | tokens attended | bytes read |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in decode["rows"]:
        batch, tokens = sizes(row)
        lines.append(
            f"| {batch} | {tokens // 1024}K | {row['dense_us']:.0f} | {row['rabitq_us']:.0f} "
            f"| {row['dense_us'] / row['rabitq_us']:.2f} | {row['kept']:.1%} | {row['bytes_read']:.1%} |"
        )
    model = generate["model"]
    lines += [
        "",
        "![Time of a decode step against the length of the context](benchmarks/results/decode.png)",
        "",
        f"**A whole model**: Llama-3.2-1B's shape ({model['num_layers']} layers, {model['num_kv_heads']} kv heads of "
        f"{model['head_dim']} dimensions) with random weights, {generate['prompt_tokens']:,} prompt tokens, "
        f"{generate['new_tokens']} new ones, batch 1, {generate['dtype']} ({provenance(generate, 'generate.json')}):",
        "",
        "| decoding | prefill, tokens/s | decode, tokens/s | tokens attended | bytes of the cache read |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in generate["rows"]:
        lines.append(
            f"| {row['decoding']} | {row['prefill_tokens_per_second']:,.0f} | {row['decode_tokens_per_second']:.0f} "
            f"| {row['kept']:.1%} | {row['bytes_read']:.1%} |"
        )
    return "\n".join(lines)


def provenance(result: dict[str, Any], name: str) -> str:
    environment = result["environment"]
    return (
        f"{environment['device']}, JAX {environment['jax']}, commit {environment['commit']}, `{environment['command']}`, "
        f"[{name}](benchmarks/results/{name})"
    )


def plot_decode(decode: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for batch, color in zip(sorted({sizes(row)[0] for row in decode["rows"]}), ("tab:blue", "tab:orange"), strict=True):
        rows = [row for row in decode["rows"] if sizes(row)[0] == batch]
        tokens = [sizes(row)[1] for row in rows]
        axes.loglog(tokens, [row["dense_us"] for row in rows], "o--", color=color, label=f"dense, batch {batch}")
        axes.loglog(tokens, [row["rabitq_us"] for row in rows], "o-", color=color, label=f"RaBitQ, batch {batch}")
    ticks = sorted({sizes(row)[1] for row in decode["rows"]})
    axes.set_xticks(ticks, [f"{tick // 1024}K" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="tokens in the cache", ylabel="µs a layer and step", title=decode["environment"]["device"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
