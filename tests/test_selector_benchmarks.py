"""The comparison of retrieval methods: its problems, a run of it, and what is made of its rows."""

import json

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import decode_attention, methods, needles, report, scores, selectors, selectors_report
from benchmarks.shapes import SUITES
from rabitq_jax.selectors import SELECTORS, SnapKV, kivi, magicpig, selector
from rabitq_jax.selectors.arguments import parse_selector
from rabitq_jax.selectors.tidal_decode import SharingLayer
from tests.test_benchmarks import CASE, rows_of, run


def attention(problem):
    """float64 [P,H,T], exact, of the new token's queries."""
    keys = np.repeat(problem.keys, needles.GROUP, axis=2).astype(float)
    logits = np.einsum("phd,pthd->pht", problem.query, keys) / problem.keys.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("task", needles.TASKS)
def test_needles_hold_their_mass_and_dense_attention_answers(task):
    problem = needles.make_needles(task, 1024, 64, 4, seed=0)
    weights = attention(problem)
    values = np.repeat(problem.values, needles.GROUP, axis=2)
    answer = np.einsum("pht,pthd,cd->phc", weights, values, problem.codes).argmax(axis=-1)
    assert np.mean(answer == problem.answers) > 0.8
    # Four tokens in a row of the answer's code hold the needle's mass.
    right = np.einsum("pthd,phd->pht", values, problem.codes[problem.answers])
    own = right > 0.99 * np.sum(problem.codes[problem.answers] ** 2, axis=-1)[..., None]
    windows = np.lib.stride_tricks.sliding_window_view(own * weights, needles.SPAN, axis=-1).sum(axis=-1)
    assert np.all(windows.max(axis=-1) > 0.9 * needles.NEEDLE_MASS)
    # Half of what is left is the sink's, more or less.
    assert 0.2 < weights[..., 0].mean() < 0.6


def test_only_the_asked_task_has_queries_for_the_needle_in_its_prompt():
    last = {}
    for task in needles.TASKS:
        problem = needles.make_needles(task, 512, 64, 2, seed=0)
        assert problem.queries.shape == (2, 511, 8, 64)
        query, queries = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (problem.query, problem.queries))
        last[task] = np.einsum("phd,pnhd->n", query, queries)[-needles.ASKING :].mean()
    assert last["asked"] > 1.5 * last["new"]


def test_every_method_can_be_read():
    texts = [method for _, method in selectors.default_methods()]
    assert len(texts) == len(set(texts)) > 80
    assert len({parse_selector(text) for text in texts}) == len(texts)


def test_a_run_its_table_and_its_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.record.environment", lambda commit: {"commit": commit})
    arguments = ["--tokens", "512", "--problems", "1", "--method", "full", "--method", "rabitq:top_p=0.5"]
    arguments += ["--method", "snapkv:budget=64,observed=16", "--commit", "abc"]
    CliRunner().invoke(selectors.main, arguments, catch_exceptions=False)
    content = json.loads((tmp_path / "selectors.json").read_text())
    assert [(row["name"], row["task"]) for row in content["rows"]] == [
        (name, task) for name in ("full", "rabitq", "snapkv") for task in ("asked", "new")
    ]
    full, rabitq, asked, new = (content["rows"][i] for i in (0, 2, 4, 5))
    assert full["captured"] == pytest.approx(1) and full["bytes_read"] == full["kept"] == 1
    assert full["output_error"] < 1e-2
    assert rabitq["kept"] < rabitq["bytes_read"] < 0.8
    assert asked["kept"] == pytest.approx(65 / 512) and asked["captured"] > new["captured"]
    lines = selectors_report.table(content).split("\n")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| full", "| rabitq", "| snapkv"]
    assert selectors_report.pareto_front(selectors_report.means(content)) >= {"full", "snapkv:budget=64,observed=16"}
    plots = pytest.importorskip("benchmarks.quality.plots")
    plots.save(selectors_report.draw(content), tmp_path / "selectors.png")
    assert (tmp_path / "selectors.png").stat().st_size > 1000


# The case's two sequences and one kv head of two query heads: 832 and 640 tokens, 256 bytes each.
TOKENS, ROW = 832 + 640, 256


def decode_rows(results, *texts: str) -> list[dict]:
    run(decode_attention.main, *(word for text in texts for word in ("--method", text)))
    rows = rows_of(results, "decode_attention_methods")
    assert [row["implementation"] for row in rows] == list(texts)
    return rows


def test_a_decode_step_of_methods_is_measured(results, monkeypatch):
    monkeypatch.setitem(SUITES, "small", (CASE,))
    full, oracle, quest, stream, tidal = rows = decode_rows(
        results, "full", "oracle-top-k:budget=64", "quest:page=16,budget=64", "streaming-llm:sink=4,recent=60",
        "tidal-decode:budget=64",
    )  # fmt: skip
    for row in rows:
        assert row["case"] == "tiny" and row["commit"] == "abc" and 0 <= row["error"] < 1e-2
        assert 0 < row["kernel_us"]["median"] and 0 < row["wall_us"]["median"]
        assert row["floor_us"] == pytest.approx(row["bytes"] / row["bandwidth_tb_per_s"] / 1e6)
        assert row["dense"] == full["dense"]
    assert full["bytes"] == full["dense"]["xla"]["bytes"] == TOKENS * ROW
    assert full["kept"] == 1 and full["true_mass"] == pytest.approx(1)
    kept = {row["implementation"].partition(":")[0]: round(row["kept"] * TOKENS) for row in rows}
    assert kept["streaming-llm"] == 2 * 64 and stream["bytes"] == 2 * 64 * ROW and "estimated_mass" not in stream
    # Each query head has 63 tokens beside the new one.
    assert 2 * 64 < kept["oracle-top-k"] <= 2 * 127
    assert oracle["bytes"] == (TOKENS - 2) * ROW / 2 + kept["oracle-top-k"] * ROW
    # Each query head has three pages, beside that of the new token; a whole page has two bounds of 128 bytes.
    assert 2 * 48 < kept["quest"] <= 2 * (2 * 48 + 16)
    assert quest["bytes"] == (51 + 39) * 2 * 128 + kept["quest"] * ROW
    assert stream["true_mass"] < quest["true_mass"] < oracle["true_mass"] < 1
    # The layer below has selected with the same queries: the oracle's list, and a mask of a byte a token.
    assert tidal["true_mass"] == oracle["true_mass"] and kept["tidal-decode"] == kept["oracle-top-k"]
    assert tidal["bytes"] == TOKENS + kept["oracle-top-k"] * ROW


def test_rows_of_methods_make_a_table(results, monkeypatch):
    monkeypatch.setitem(SUITES, "small", (CASE,))
    rabitq, kivi = decode_rows(results, "rabitq:top_p=0.9", "kivi:bits=2")
    assert 0.85 < rabitq["true_mass"] < 1 and rabitq["kept"] < rabitq["bytes"] / (TOKENS * ROW) < 0.6
    table = selectors_report.time_table([rabitq, kivi]).split("\n")
    # In the order of EACH, and what it does not have at the end.
    assert len(table) == 4 and table[3].startswith("| tiny | `rabitq:top_p=0.9` | ")
    # 64 numbers of 2 bits, and two groups' zeros and scales; 128 to 255 exact keys and 128 exact values a sequence.
    assert table[2].startswith("| tiny | `kivi:bits=2` | ")
    assert table[2].endswith(f" | {kivi['bytes'] / TOKENS / ROW:.1%} | 100.0% | 100.0% |")
    exact = (832 - 768) + 640 % 128 + 2 * 128
    assert kivi["bytes"] == (2 * TOKENS - exact) * (16 + 8) + exact * 128
    monkeypatch.setattr(report, "RESULTS", results)
    (results / "training.json").write_text((report.PAGES[1].parent / "results/training.json").read_text())
    assert "method-times" not in report.sections()
    (results / "decode_attention_methods.json").write_text(json.dumps([rabitq, kivi]))
    assert table[3] in report.sections()["method-times"]


@pytest.mark.parametrize(
    "text,module,function",
    [
        ("quest:budget=64", selector, "gathered_attention"),
        ("magicpig:bits=6,tables=20", magicpig, "weighted_attention"),
        ("kivi:bits=2", kivi, "decode_attention"),
    ],
)
def test_a_wrong_step_is_not_timed(text, module, function, results, monkeypatch):
    monkeypatch.setitem(SUITES, "small", (CASE,))
    right = getattr(module, function)
    jax.clear_caches()
    monkeypatch.setattr(module, function, lambda *args, **options: 1.05 * right(*args, **options))
    with pytest.raises(ValueError, match="error of decode attention must be at most 0.01"):
        run(decode_attention.main, "--method", text)
    assert not (results / "cpu").exists()
    jax.clear_caches()


def test_other_benchmarks_take_no_method():
    outcome = CliRunner().invoke(scores.main, ["--method", "full"])
    assert outcome.exit_code == 2 and "No such option" in outcome.output


def test_methods_of_many_layers_are_measured_in_the_middle_one():
    assert methods.in_layer("pyramidkv:budget=264,beta=20") == SnapKV(
        budget=8 + int(499.2 - 486.4 * 16 / 31), observed=8
    )
    assert isinstance(methods.in_layer("tidal-decode"), SharingLayer)
    assert methods.expand(("full", "all")) == ("full", *methods.EACH)
    assert {text.partition(":")[0] for text in methods.EACH} == {"rabitq", *SELECTORS}


@pytest.mark.parametrize(
    "arguments,message",
    [(("--method", "quest:pages=8"), "Quest has no argument 'pages'"), (("--method", "best"), "must be one of rabitq")],
)
def test_a_method_that_is_none_is_told_before_anything_is_measured(arguments, message, results):
    outcome = CliRunner().invoke(decode_attention.main, arguments)
    assert outcome.exit_code == 2 and "'--method'" in outcome.output and message in outcome.output
