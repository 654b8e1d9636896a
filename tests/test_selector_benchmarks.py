"""The comparison of retrieval methods: its problems, a run of it, and what is made of its rows."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import decode_attention, needles, scores, selectors, selectors_report
from rabitq_jax.selectors.arguments import parse_selector


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


def test_decode_attention_takes_any_method(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.record.environment", lambda commit: {"commit": commit, "device": "a", "jax": "b"})
    monkeypatch.setattr("benchmarks.timing.STEPS", 2)
    methods = ["quest:page=16,budget=128", "h2o:budget=128", "magicpig:bits=6,tables=8", "rabitq:top_p=0.9"]
    arguments = ["--suite", "small", *(x for method in methods for x in ("--method", method)), "--commit", "abc"]
    CliRunner().invoke(decode_attention.main, arguments, catch_exceptions=False)
    rows = json.loads((tmp_path / "cpu" / "decode_attention_methods.json").read_text())
    assert [row["implementation"] for row in rows] == 2 * methods
    assert [row["error"] is None for row in rows] == 2 * [False, False, True, False]
    for row in rows:
        dense = row["dense"]["xla"]
        assert 0 < row["kept"] < 1 and 0 < row["true_mass"] < 1 and 0 < row["bytes"] < 1.3 * dense["bytes"]
    ragged = [row for row in rows if "ragged" in row["case"]]
    assert [len(row["kept_by_sequence"]) for row in ragged] == [2] * len(methods)
    # A kv head attends to what any of its four query heads has chosen.
    assert 128 / (2048 - 192) < rows[0]["kept"] < 4.5 * 128 / (2048 - 192)
    lines = selectors_report.time_table(rows).split("\n")
    assert len(lines) == 2 + len(rows) and "`quest:page=16,budget=128`" in lines[2]


def test_other_benchmarks_take_no_method():
    result = CliRunner().invoke(scores.main, ["--method", "full"])
    assert result.exit_code == 2 and "takes no --method" in result.output


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
    assert selectors_report.pareto_front(content) >= {"full", "snapkv:budget=64,observed=16"}
    plots = pytest.importorskip("benchmarks.quality.plots")
    plots.save(selectors_report.draw(content), tmp_path / "selectors.png")
    assert (tmp_path / "selectors.png").stat().st_size > 1000
