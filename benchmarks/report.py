"""The tables and the pictures of README.md and benchmarks/README.md, from the files in benchmarks/results alone.

python -m benchmarks.report          # rewrites both between their markers, and the pictures in results/
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import certificate_report, selectors_report, speed_report
from benchmarks.quality.report import about_training, sweep_table, table
from benchmarks.record import RESULTS

PAGES = (Path(__file__).parent.parent / "README.md", Path(__file__).parent / "README.md")
CERTIFICATE_TOP_P = 0.95
OPERATIONS = ("scores", "top_p", "gathered_attention")


def main() -> None:
    # An extra: the tables need no plotting library.
    from benchmarks import speed_plots
    from benchmarks.quality import plots, sweep

    if has("decode_attention.json"):
        speed_plots.draw(read("decode_attention.json"), RESULTS / "decode_attention.png")
    if has("quality.json"):
        plots.draw(read("quality.json"), RESULTS, "quality")
    if has("sweep.json"):
        plots.save(sweep.draw(read("sweep.json")), RESULTS / "sweep.png")
    if has("certificate.json"):
        plots.save(certificate_report.draw(read("certificate.json")), RESULTS / "certificate.png")
    if has("selectors.json"):
        plots.save(selectors_report.draw(read("selectors.json")), RESULTS / "selectors.png")
    if has("methods.json"):
        plots.save(plots.draw_methods(read("methods.json")), RESULTS / "methods.png")
    plots.save(plots.draw_training(read("training.json")), RESULTS / "training.png")
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")


def rewritten(page: str) -> str:
    """The page with the parts between its markers made anew, where there are results to make them of."""
    for marker, content in sections().items():
        block = f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->"
        pattern = rf"<!-- {marker} -->.*?<!-- /{marker} -->"
        page = re.sub(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
    return page


def sections() -> dict[str, str]:
    """What stands between the markers of each name."""
    made = {"results": results()}
    if has("decode_attention.json"):
        made["headline"] = paragraph(speed_report.decode_headline(read("decode_attention.json")))
    if has("demo.txt"):
        made["demo"] = f"```\n{(RESULTS / 'demo.txt').read_text(encoding='utf-8').rstrip()}\n```"
    if has("quality.json"):
        made["quality"] = quality(read("quality.json"), read("training.json"))
    if has("sweep.json"):
        sweep = read("sweep.json")
        made["sweep"] = "\n\n".join([paragraph(f"{provenance(sweep, 'sweep.json', 'results')}:"), sweep_table(sweep)])
    if has("certificate.json"):
        made["certificate"] = certificate(read("certificate.json"))
    if has("decode_attention_certified.json"):
        files = [f"decode_attention_{rule}.json" for rule in ("certified", "debiased")]
        made["selection-times"] = part(
            speed_report.selections([row for name in files if has(name) for row in read(name)])
        )
    if has("selectors.json"):
        made["selectors"] = selectors(read("selectors.json"))
    if has("decode_attention_methods.json"):
        made["method-times"] = method_times(read("decode_attention_methods.json"))
    if has("methods.json"):
        made["methods"] = methods(read("methods.json"))
        made["methods-summary"] = methods_summary(read("methods.json"))
    measured = [name for name in OPERATIONS if has(f"{name}.json")]
    if measured:
        made["operations"] = "\n\n".join(part(speed_report.operation(read(f"{name}.json"), name)) for name in measured)
    return made


def results() -> str:
    """The speed of a layer's decode step and of whole models."""
    parts = []
    if has("decode_attention.json"):
        parts.append(
            part(speed_report.decode_attention(read("decode_attention.json"))) + picture("decode_attention.png")
        )
    if has("decode_step.json"):
        parts.append(part(speed_report.decode_step(read("decode_step.json"))))
    if has("prefill.json"):
        parts.append(part(speed_report.prefill(read("prefill.json"))))
    if has("generate.json"):
        parts.append(generate_table(read("generate.json")))
    return "\n\n".join(parts)


def part(made: tuple[str, list[str]]) -> str:
    """A paragraph and the table below it."""
    about, lines = made
    return "\n".join([paragraph(about), "", *lines])


def picture(name: str) -> str:
    text = "Time against the length of the context, time by stage, and the share of the byte floor"
    return f"\n\n![{text}](benchmarks/results/{name})"


def has(name: str) -> bool:
    return (RESULTS / name).exists()


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def generate_table(generate: dict[str, Any]) -> str:
    model = generate["model"]
    about_generate = (
        f"**A whole model**: Llama-3.2-1B's shape ({model['num_layers']} layers, {model['num_kv_heads']} kv heads of "
        f"{model['head_dim']} dimensions) with random weights, {generate['prompt_tokens']:,} prompt tokens, "
        f"{generate['new_tokens']} new ones, batch 1, {generate['dtype']} ({provenance(generate, 'generate.json')}):"
    )
    lines = [
        paragraph(about_generate),
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


def quality(measured: dict[str, Any], training: dict[str, Any]) -> str:
    """What the retrieval model answers, and what it reads for that."""
    (problems,) = {row["examples"] for row in measured["rows"]}
    choices = "".join(f", {name}={value}" for name, value in measured["settings"].items())
    about = (
        f"**Answers of a trained model** ({provenance(measured, 'quality.json')}; `RaBitQConfig(top_p=...{choices})`). "
        f"{about_training(training)} Tasks in the manner of RULER hide facts in sources of Python's standard library "
        f"that were held out from training, and ask for one at the end. A score is the share of {problems} questions "
        "that were answered right, in percent, with its 95 % interval. Tokens attended and bytes read are means over "
        "all layers and tasks."
    )
    pictures = {
        "scores": "Scores against the share of tokens attended",
        "heads": "Tokens attended by each layer and kv head",
        "mass": "Attention claimed and captured",
    }
    lines = [paragraph(about), "", table(measured)]
    for name, text in pictures.items():
        lines += ["", f"![{text}](benchmarks/results/quality-{name}.png)"]
    return "\n".join(lines)


def certificate(measured: dict[str, Any]) -> str:
    """True attention captured against the p that was asked for."""
    p = min((row["top_p"] for row in measured["rows"]), key=lambda p: abs(p - CERTIFICATE_TOP_P))
    (steps,) = {row["head_steps"] for row in measured["rows"] if row["heads"] == "model"}
    problems = f"{measured['examples']} problems of each of {', '.join(measured['tasks'])}"
    about = (
        f"**The trained model** ({provenance(measured, 'certificate.json')}; every layer with codes; {problems} at "
        f"{measured['tokens']:,} tokens, {steps:,} head-steps a line, failure rate {measured['failure_rate']:g}). "
        "Captured is the share of the exact attention in the tokens that a kv head attends. A head-step is one query "
        "head in one layer and decode step. The output's error is its distance to dense attention's, relative to that, "
        "mean over head-steps."
    )
    hard = (
        f"**Heads that are hard to promise anything of**, at p = {p:g}, {measured['hard_tokens']:,} tokens each, and "
        "every query head alone in its group: "
        + "; ".join(f"{kind}: {text}" for kind, text in measured["kinds"].items())
        + "."
    )
    picture = "![True attention captured, and tokens attended, against p](benchmarks/results/certificate.png)"
    parts = [paragraph(about), certificate_report.table(measured), paragraph(hard)]
    return "\n\n".join([*parts, certificate_report.hard_table(measured, p), picture])


def selectors(measured: dict[str, Any]) -> str:
    """Every method on planted answers."""
    tasks = "; ".join(f"{task}: {text}" for task, text in measured["tasks"].items())
    heads = measured["problems"] * len(measured["tasks"])
    about = (
        f"**Planted answers** ({provenance(measured, 'selectors.json')}; {heads} caches of {measured['tokens']:,} "
        f"tokens in {measured['dtype']}, 2 kv heads of 4 query heads and {measured['head_dim']} dimensions; half of "
        f"each of: {tasks}). Each column takes the best of a method's budgets within so many of dense attention's "
        "bytes; it is empty where even the smallest budget reads more. Captured is the share of the exact attention in "
        "the tokens attended. The front has the points of which no other captures as much with fewer bytes; oracles, "
        "and KIVI, which leaves nothing out, do not count for it."
    )
    picture = "![True attention captured, and needles answered, against bytes read](benchmarks/results/selectors.png)"
    return "\n\n".join([paragraph(about), selectors_report.table(measured), picture])


def method_times(rows: list[dict[str, Any]]) -> str:
    """Every method's decode step."""
    one = {"environment": rows[0] | {"command": "python -m benchmarks.decode_attention --suite ... --method ..."}}
    about = (
        f"**A decode step of every method** ({provenance(one, 'decode_attention_methods.json', 'results')}), on caches "
        "planted so that RaBitQ keeps 3 %. Choosing and attending; wall time also appends the token and keeps the "
        "method's state. Only RaBitQ's scores and Top-p are kernels: other methods score in XLA, find the best by its "
        "Top-k or the portable kernels of Top-p, and share the kernels that list tokens and attend to them."
    )
    return "\n\n".join([paragraph(about), selectors_report.time_table(rows)])


def methods(measured: dict[str, Any]) -> str:
    """Every method on the retrieval model."""
    (problems,) = {row["examples"] for row in measured["rows"]}
    about = (
        f"**Answers of the retrieval model** ({provenance(measured, 'methods.json', 'results')}; {problems} problems "
        "of each task): scores in percent with their 95 % interval, and what was read and captured, means over all "
        "layers and tasks."
    )
    picture = "![Scores, and attention captured, against the share of bytes read](results/methods.png)"
    return "\n\n".join([paragraph(about), table(measured), picture])


def methods_summary(measured: dict[str, Any]) -> str:
    """The best of every method on the retrieval model, at the longest prompts."""
    tokens = max(row["tokens"] for row in measured["rows"])
    longest = {kind: [row for row in measured[kind] if row["tokens"] == tokens] for kind in ("rows", "probes")}
    (problems,) = {row["examples"] for row in longest["rows"]}
    about = (
        f"**The retrieval model** ({provenance(measured, 'methods.json', 'benchmarks/results')}; prompts of {tokens:,} "
        f"tokens, {problems} problems of each task). Scores are means over the tasks; captured is the mean over heads, "
        "layers and decode steps. The columns are as above."
    )
    return "\n\n".join([paragraph(about), selectors_report.model_table(longest)])


def paragraph(text: str) -> str:
    """Text in lines of up to 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def provenance(result: dict[str, Any], name: str, folder: str = "benchmarks/results") -> str:
    environment = result["environment"]
    return (
        f"{environment['device']}, JAX {environment['jax']}, commit {environment['commit']}, "
        f"`{environment['command']}`, [{name}]({folder}/{name})"
    )


if __name__ == "__main__":
    main()
