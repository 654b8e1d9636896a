"""Evaluation against independent statements of what it measures, on a tiny model with random weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import selectors_report
from benchmarks.quality import __main__ as command
from benchmarks.quality import evaluate, parts, plots, report, sweep, tasks
from benchmarks.quality.compared import COMPARED
from benchmarks.quality.evaluate import Known
from benchmarks.quality.problem import Problem
from models import Tokenizer, causal_attention
from rabitq_jax import RaBitQConfig, generate
from rabitq_jax.selectors import FullAttention, Quest, TidalDecode, TopK
from rabitq_jax.selectors.arguments import parse_selector
from tests.checkpoints import TINY, load, write_model, write_tokenizer

KEY = jax.random.key(0)
CONFIG = RaBitQConfig(top_p=0.7, dense_layers=1, sink=4, recent=8, interval=32)


SHAPE = TINY | {"vocab_size": 258, "max_position_embeddings": 2048, "head_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole checkpoint, of one layer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_model(folder, SHAPE | {"num_hidden_layers": 1})
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of two layers, the first of which attends densely under CONFIG."""
    return load(write_model(tmp_path_factory.mktemp("model"), SHAPE))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def known():
    rng = np.random.default_rng(0)
    lengths = [(200, 9), (150, 4), (260, 6)]
    draw = lambda size: rng.integers(0, 258, size).tolist()  # noqa: E731
    return Known(prompts=[draw(prompt) for prompt, _ in lengths], texts=[draw(text) for _, text in lengths])


def force(model, known, *configs):
    """The pass of each configuration, all texts in one batch."""
    return [run for (run,) in evaluate.probe(model, known, configs, key=KEY)]


def forward(model, tokens):
    """float32 log-probabilities [N,V] after each token, by plain causal attention over the whole text."""
    tokens = jnp.array([tokens])
    positions = jnp.arange(tokens.shape[1])[None]
    caches = (None,) * model.config.num_layers
    hidden, _, _ = model(tokens, positions, jnp.array([tokens.shape[1]]), caches, causal_attention)
    return np.asarray(jax.nn.log_softmax(model.logits(hidden))[0])


@pytest.mark.parametrize(
    "config",
    [None, dataclasses.replace(CONFIG, top_p=1.0), TidalDecode(selection_layers=(0,), rule=TopK(budget=4096))],
    ids=["dense", "p = 1", "tidal-decode"],
)
def test_log_probs_are_those_of_a_forward_pass(model, known, config):
    (run,) = force(model, known, config)
    for b, (prompt, text) in enumerate(zip(known.prompts, known.texts, strict=True)):
        want = forward(model, prompt + text)[len(prompt) - 1 : -1]
        assert run.valid[b].sum() == len(text) and run.targets[b, : len(text)].tolist() == text
        np.testing.assert_allclose(run.log_probs[b, : len(text)], want, atol=2e-3)
        assert np.allclose(run.probes.captured[b, : len(text)], 1, atol=1e-5)
        assert np.allclose(run.probes.kept[b, : len(text)], 1)


def test_captured_is_the_attention_of_the_attended_tokens(model, known):
    """Against the mass that decode's output itself shows: values that mark the tokens it attends."""
    run, more = force(model, known, CONFIG, dataclasses.replace(CONFIG, top_p=0.99))
    probes, valid = run.probes, run.valid
    captured, kept = probes.captured[valid], probes.kept[valid]
    assert (captured[:, 0] == 1).all() and (kept[:, 0] == 1).all() and (probes.error[valid][:, 0] == 0).all()
    assert (captured[:, 1] < 1 - 1e-4).any() and (captured > 0).all() and (captured <= 1 + 1e-5).all()
    assert (kept[:, 1] < 1).any()
    # A kv head attends the union of its query heads' tokens, each of which claims p at least.
    assert (probes.claimed[valid][:, 1] >= CONFIG.top_p - 1e-3).all()
    assert (more.probes.captured[valid][:, 1] >= captured[:, 1] - 1e-5).all()


def test_error_of_the_logits_falls_with_a_centroid(model, known):
    centred, plain = force(model, known, CONFIG, dataclasses.replace(CONFIG, key_centroid="none"))
    errors = [run.probes.error[run.valid][:, 1].mean() for run in (centred, plain)]
    assert 0 < errors[0] < errors[1]


def test_prompts_are_read_again_for_a_mean_of_their_queries(model, known):
    """As codes from the keys alone, but for the error that centring the queries takes away or adds."""
    plain, centred = force(model, known, CONFIG, dataclasses.replace(CONFIG, query_centroid="prompt"))
    errors = [run.probes.error[run.valid][:, 1].mean() for run in (plain, centred)]
    assert errors[0] != errors[1] and errors[1] == pytest.approx(errors[0], rel=0.5)


@pytest.mark.parametrize("config", [None, CONFIG], ids=["dense", "sparse"])
def test_exact_texts_are_those_that_greedy_decoding_writes(model, config, known):
    prompts = [prompt[:120] for prompt in known.prompts]
    # Nearest rounding: generate and teacher_forced fold their keys differently.
    config = config and dataclasses.replace(config, query_rounding="nearest")
    out = generate(model, prompts, config, max_new_tokens=6, key=KEY, eos_token_ids=())
    # The first token is the exact prefill's; what follows it are decode steps, here as there.
    prompts = [[*prompt, first] for prompt, first in zip(prompts, out.tokens[:, 0].tolist(), strict=True)]
    texts = out.tokens[:, 1:].tolist()
    (run,) = force(model, Known(prompts=prompts, texts=texts), config)
    assert evaluate.compare([run], [run])["exact"] == 1
    texts[0][3] = (texts[0][3] + 1) % 258
    (run,) = force(model, Known(prompts=prompts, texts=texts), config)
    assert evaluate.compare([run], [run])["exact"] == pytest.approx(2 / 3)


def test_compare_measures_divergence_and_perplexity(model, known):
    dense, sparse = force(model, known, None, CONFIG)
    measures = evaluate.compare([sparse], [dense])
    p, q = (run.log_probs.astype(np.float64)[run.valid] for run in (dense, sparse))
    assert measures["divergence"] == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), axis=1)), rel=1e-4)
    chosen = q[np.arange(len(q)), sparse.targets[sparse.valid]]
    assert measures["perplexity"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-5)
    assert measures["steps"] == 19
    assert evaluate.compare([dense], [dense])["divergence"] == 0


def scripted(task: str, answer: str, score) -> Problem:
    return Problem(task=task, prompt=f"{task} text", answers=(answer,), max_new_tokens=5, stop=("\n",), score=score)


def test_answers_are_those_of_generate_cut_at_the_stop(folder, tokenizer):
    model, seen = load(folder), []
    problems = [scripted(f"t{i % 2}", "x", lambda reply: seen.append(reply) or float(len(reply) > 0)) for i in range(5)]
    advanced = []
    configs = [None, dataclasses.replace(CONFIG, dense_layers=0)]
    dense, answered = evaluate.answer(model, tokenizer, problems, configs, key=KEY, advance=advanced.append)
    assert [one.reply for one in dense + answered] == seen and sum(advanced) == 10
    out = generate(model, tokenizer.encode("t0 text"), None, max_new_tokens=5, key=KEY, eos_token_ids=())
    assert tokenizer.decode(out.tokens[0]).split("\n")[0] == dense[0].reply
    rows = evaluate.summarize(answered)
    assert [(row["task"], row["examples"]) for row in rows] == [("t0", 3), ("t1", 2)]
    assert rows[0]["kept"] == pytest.approx(np.mean(rows[0]["kept_by_head"]), abs=1e-4)


def test_line_ends_stop_a_reply_only_where_every_problem_stops_there(tokenizer):
    line, free = scripted("a", "x", len), dataclasses.replace(scripted("b", "x", len), stop=())
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    assert newline in evaluate.stop_tokens(tokenizer, [line, line])
    assert newline not in evaluate.stop_tokens(tokenizer, [line, free])


@pytest.mark.parametrize(
    "scores, want", [([1] * 10, (0.7225, 1.0)), ([1, 0] * 50, (0.4038, 0.5962)), ([0.5, 0.7] * 8, (0.549, 0.651))]
)
def test_interval(scores, want):
    """Wilson's intervals of 10 of 10 and 50 of 100 by its formula; the normal one of other scores."""
    np.testing.assert_allclose(evaluate.interval(np.array(scores, float)), want, atol=5e-4)


def test_plain_text_is_cut_into_prompt_and_continuation(tokenizer):
    pieces = Known.plain(tokenizer, "abcdefghij" * 10, 20, 5, 3)
    assert [len(prompt) for prompt in pieces.prompts] == [20] * 3 and [len(text) for text in pieces.texts] == [5] * 3
    text = tokenizer.decode(pieces.prompts[2] + pieces.texts[2])
    assert ("abcdefghij" * 10).endswith(text)
    with pytest.raises(ValueError, match="the text has 3 tokens"):
        Known.plain(tokenizer, "abc", 20, 5, 1)


def test_settings_become_fields():
    settings = ["sink=4", "selection=certified", "failure_rate=1e-2", "dense_layers=0"]
    assert command.parse_settings(settings) == {
        "sink": 4, "selection": "certified", "failure_rate": 0.01, "dense_layers": 0,
    }  # fmt: skip
    for wrong in ("sink", "sinks=4"):
        with pytest.raises(ValueError, match=f"got '{wrong}'"):
            command.parse_settings([wrong])


def test_command_writes_results_tables_and_pictures(folder, tmp_path, monkeypatch):
    for module in (command, sweep):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.record.environment", lambda commit: {"commit": commit})
    monkeypatch.setattr(parts, "TEXT_NEW_TOKENS", 4)
    arguments = ["--model", str(folder), "--tokens", "400", "--examples", "2", "--probes", "1", "--top-p", "0.8"]
    arguments += ["--task", "single-number", "--task", "variables", "--dtype", "float32", "--set", "dense_layers=0"]
    result = CliRunner().invoke(command.main, [*arguments, "--commit", "abc"], catch_exceptions=False)
    assert "| p = 0.8 |" in result.output
    content = json.loads((tmp_path / "quality.json").read_text())
    assert content["settings"] == {"dense_layers": 0} and content["environment"] == {"commit": "abc"}
    assert [(row["task"], row["top_p"]) for row in content["rows"]] == [
        ("single-number", None), ("variables", None), ("single-number", 0.8), ("variables", 0.8),
    ]  # fmt: skip
    assert {(probe["texts"], probe["top_p"]) for probe in content["probes"]} == {
        ("answers", None), ("answers", 0.8), ("text", None), ("text", 0.8),
    }  # fmt: skip
    assert (tmp_path / "quality.md").read_text().strip() == report.table(content)
    for picture in ("scores", "heads", "mass"):
        assert (tmp_path / f"quality-{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_other_methods_have_lines_of_their_own():
    part = parts.Part(
        model="", dtype="float32", configs=(None, CONFIG), methods=("quest:page=8,budget=64", "full"), chat=False,
        examples=1,
    )  # fmt: skip
    about, configs = zip(*part.ways, strict=True)
    assert configs == (None, CONFIG, Quest(page=8, rule=TopK(budget=64)), FullAttention())
    rows = [
        {"task": task, "tokens": 10, **way, "kept": 0.1, "bytes_read": 0.2, "score": i / 4, "interval": (0, 1)}
        for task in ("a", "b")
        for i, way in enumerate(about)
    ]
    table = report.table({"rows": rows, "probes": []}).split("\n")
    assert [line.split(" | ")[0] for line in table[4:]] == [
        "| dense", "| p = 0.7", "| `quest:page=8,budget=64`", "| `full`",
    ]  # fmt: skip
    probes = [
        {"texts": texts, "tokens": 10, **way, "bytes_read": 0.3, "captured": i / 5 if texts == "answers" else 9}
        for texts in ("answers", "text")
        for i, way in enumerate(about)
    ]
    scores, captured = plots.draw_methods({"rows": rows, "probes": probes}).axes
    for axis, steps in ((scores, 4), (captured, 5)):
        assert [line.get_label() for line in axis.lines] == ["dense", "rabitq", "quest", "full"]
        assert [line.get_ydata().tolist() for line in axis.lines] == [[i / steps] for i in range(4)]
    assert len(plots.draw_methods({"rows": rows, "probes": []}).axes) == 1
    # All read a fifth of the bytes; the one that captures most is on the front.
    lines = selectors_report.model_table({"rows": rows, "probes": probes}).split("\n")
    assert lines[2] == "| dense |  | 0.000 |  | 0% |  | 0 of 1 |"
    assert lines[5] == "| full |  | 0.600 |  | 75% |  | 1 of 1 |"


def test_parts_of_a_length_have_every_way_once(monkeypatch):
    """Each decodes densely, to compare with, and one has the rows of it."""
    methods = ("quest:page=8,budget=64", "full")
    whole = parts.Part(
        model="", dtype="float32", configs=(None, CONFIG), methods=methods, chat=False, examples=1, probes=1
    )
    monkeypatch.setattr(parts, "load_pretrained", lambda *_, **__: (None, None))
    monkeypatch.setattr(parts, "load_problems", lambda *_: (10, []))
    monkeypatch.setattr(parts, "standard_library", lambda _: b"")
    monkeypatch.setattr(parts.Known, "answers", classmethod(lambda *_: None))
    monkeypatch.setattr(parts.Known, "plain", classmethod(lambda *_: None))
    monkeypatch.setattr(parts, "answer", lambda *args, **_: list(map(repr, args[3])))
    monkeypatch.setattr(parts, "summarize", lambda replies: [{"of": replies}])
    monkeypatch.setattr(parts, "probe", lambda *args, **_: list(map(repr, args[2])))
    monkeypatch.setattr(parts, "compare", lambda run, dense: {"of": (run, dense)})
    rows, probes = parts.evaluate_part(whole)
    assert [row["of"] for row in rows] == [repr(config) for _, config in whole.ways]
    assert probes[1]["of"] == (repr(CONFIG), "None") and len(probes) == 8
    for count in (1, 2, 3, 9):
        pieces = whole.split(count)
        assert len(pieces) == min(count, 3)
        measured = [parts.evaluate_part(piece) for piece in pieces]
        assert sum((own for own, _ in measured), []) == rows
        # Probes of a part come texts by texts.
        assert sorted(map(repr, sum((own for _, own in measured), []))) == sorted(map(repr, probes))


def test_compared_methods_can_be_read():
    assert len({parse_selector(method) for method in COMPARED}) == len(COMPARED)


def test_sweep_reads_its_table_off_at_equal_bytes():
    rows = [
        {
            "change": change,
            "top_p": p,
            "bytes_read": b,
            "kept": b / 2,
            "exact": 1.0,
            "divergence": d,
            "captured": 0.9,
            "error_nats": 1.0,
        }
        for change, points in {
            "base": [(0.8, 0.1, 0.3), (0.9, 0.2, 0.2), (0.99, 0.4, 0.1)],
            "better": [(0.8, 0.1, 0.2), (0.9, 0.3, 0.0)],
            "dear": [(0.8, 0.5, 0.2), (0.9, 0.6, 0.1)],
            "selection=debiased": [(0.5, 0.3, 0.2), (0.9, 0.6, 0.1)],
        }.items()
        for p, b, d in points
    ]
    lines = report.sweep_table({"rows": rows, "tokens": 100}).split("\n")
    assert "20.0% of the bytes" in lines[0]
    assert lines[4].startswith("| `base` | 0.900 | 10.0% | 100.0% | 0.2000 |")
    assert lines[5].startswith("| `better` | 0.850 | 10.0% | 100.0% | 0.1000 |")
    assert lines[6].startswith("| `dear` | 50.0% to 60.0% of the bytes |")
    assert "35.0% of the bytes" in lines[9]
    assert [line.split(" | ")[:3] for line in lines[13:]] == [
        ["| `base`", "0.968", "17.5%"], ["| `selection=debiased`", "0.567", "17.5%"],
    ]  # fmt: skip


def test_sweep_changes_one_choice():
    base = sweep.Case(change={}, top_p=0.9)
    assert base.config == RaBitQConfig(top_p=0.9)
    for change in sweep.VARIANTS[1:]:
        case = sweep.Case(change=change, top_p=0.9)
        # The tail needs a selection that verifies.
        assert len(change) == 1 + ("tail" in change) and case.config != base.config
        assert case.label == ", ".join(f"{name}={value}" for name, value in change.items())


def test_heat_map_takes_the_p_nearest_to_its_own(tmp_path):
    rows = [
        {"task": "a", "tokens": 10, "top_p": p, "kept": 0.1, "kept_by_head": [[0.1, 0.2]], "score": 1.0}
        for p in (None, 0.5, 0.9)
    ]
    figure = plots.draw_heads({"rows": rows, "probes": []})
    assert "p = 0.9" in figure.get_suptitle()


def test_every_task_has_facts_or_is_of_words():
    assert [name for name, task in tasks.TASKS.items() if task.facts is None] == ["frequent-words"]
