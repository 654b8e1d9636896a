import dataclasses
import json
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import (
    byte_counts,
    certificate,
    certificate_report,
    decode_attention,
    decode_step,
    gathered_attention,
    planting,
    prefill,
    record,
    report,
    scores,
    speed_report,
    timing,
    top_p,
)
from benchmarks.checks import check, check_superset
from benchmarks.exact import captured_mass, exact_logits
from benchmarks.make_checkpoint import SHAPES
from benchmarks.shapes import ROOM, SUITES, Shape, make_case
from models import Llama, LlamaConfig
from rabitq_jax import RaBitQConfig
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.top_p import select_reference
from tests.test_lowering import kernel_text

ROOT = Path(__file__).parent.parent
CONFIG = RaBitQConfig()
CASE = make_case(Shape(2, 1, 2, 1024, 64), name="tiny", lengths=(1024, 640), shares=(0.25, 0.4))


@pytest.fixture
def results(results, monkeypatch):
    """With whole models that are small."""
    monkeypatch.setattr(decode_step, "STEPS", 2)
    monkeypatch.setitem(SHAPES, "demo", dataclasses.replace(SHAPES["demo"], num_layers=3))
    return results


def rows_of(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / "cpu" / f"{name}.json").read_text())


def run(main, *arguments: str) -> str:
    outcome = CliRunner().invoke(main, [*arguments, "--commit", "abc"], catch_exceptions=False)
    assert outcome.exit_code == 0
    return outcome.output


def cache_of(quantized: list[int], config: RaBitQConfig = CONFIG):
    """An empty cache of 2 kv heads of 64 dimensions that says it holds tokens."""
    cache = init_layer_cache(len(quantized), 1024, 2, 64, config)
    return cache.__class__(**vars(cache) | {"quantized": jnp.array(quantized), "length": jnp.array(quantized) + 70})


class TestPlanting:
    def test_the_stated_share_comes_out_and_holds_the_mass(self):
        query, cache = planting.planted_case(CASE, CONFIG)
        facts = planting.kept_facts(query, cache, planting.select(query, cache, CONFIG))
        np.testing.assert_allclose(facts["kept_by_sequence"], CASE.shares, rtol=0.05)
        np.testing.assert_array_equal(cache.length, [1024 - ROOM, 640])
        assert facts["estimated_mass"] >= CONFIG.top_p
        assert 0.85 < facts["least_true_mass"] <= facts["true_mass"] < 1

    def test_spread_logits_keep_the_stated_share_and_fall_off_smoothly(self):
        case = dataclasses.replace(CASE, spread=True)
        query, cache = planting.planted_case(case, CONFIG)
        facts = planting.kept_facts(query, cache, planting.select(query, cache, CONFIG))
        np.testing.assert_allclose(facts["kept_by_sequence"], CASE.shares, rtol=0.05)
        logits = np.asarray(exact_logits(query, cache))[0, :, :, : 1024 - ROOM]
        deviation = np.std(logits, axis=-1, keepdims=True)
        assert np.all(deviation > 1.5)
        # Up to where 832 normal numbers reach, once in a thousand times not.
        assert np.all((logits.max(-1) - logits.mean(-1)) / deviation[..., 0] > 2.4)
        assert np.max((logits.max(-1) - logits.mean(-1)) / deviation[..., 0]) > 2.95
        # A normal distribution's quantiles, within some 4 standard errors of 832 tokens.
        for share, quantile in ((0.9, 1.28), (0.5, 0.0), (0.1, -1.28)):
            got = np.quantile((logits - logits.mean(-1, keepdims=True)) / deviation, share, axis=-1)
            np.testing.assert_allclose(got, quantile, atol=0.25)

    def test_true_mass_is_that_of_the_softmax(self):
        query, cache = planting.planted_case(CASE, CONFIG)
        indices = jnp.broadcast_to(jnp.arange(1024), (2, 1, 1024))
        everything = captured_mass(exact_logits(query, cache), indices, cache.length[:, None])
        np.testing.assert_allclose(everything, 1, rtol=1e-5)
        first = np.asarray(captured_mass(exact_logits(query, cache), indices, jnp.array([[100], [100]])))[1, 0, 1]
        logits = np.asarray(cache.keys[1, 0, :640], np.float64) @ np.asarray(query[1, 0, 1], np.float64) / 8
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(first, weights[:100].sum() / weights.sum(), rtol=1e-3)

    def test_a_share_below_sinks_and_window_keeps_little_more_than_those(self):
        case = make_case(CASE.shape, shares=(0.001, 0.001))
        query, cache = planting.planted_case(case, CONFIG)
        exact = cache.length - cache.quantized + CONFIG.sink
        more = planting.select(query, cache, CONFIG).counts - exact[:, None]
        assert np.all(more > 0) and np.all(more < 2 * planting.LEAST_HEAVY * case.shape.group)


class TestByteCounts:
    # Two kv heads score 256 - 16 and 512 - 16 tokens; a code is 2 words and a scale, 10 bytes, and a centroid of 128
    # bytes serves 128 tokens.
    SCORED = 2 * (240 + 496)

    def test_scored_tokens_leave_out_sinks(self):
        assert byte_counts.scored_tokens(cache_of([256, 512]), 16) == self.SCORED
        assert byte_counts.scored_tokens(cache_of([0, 512]), 16) == 2 * 496

    def test_codes_and_scores(self):
        assert byte_counts.code_bytes(cache_of([256, 512]), 16) == self.SCORED * 11
        assert byte_counts.score_bytes(cache_of([256, 512]), 16, 4, 1) == self.SCORED * 15

    def test_codes_with_a_bias_and_one_centroid(self):
        config = RaBitQConfig(query_centroid="prompt", key_centroid="prompt")
        assert byte_counts.code_bytes(cache_of([256, 512], config), 16) == self.SCORED * (12 + 128 / 1024)

    def test_selection_and_attention(self):
        cache = cache_of([256, 512])
        assert byte_counts.selection_bytes(cache, 16, 4, 4, kept=100) == self.SCORED * 16 + 400
        assert byte_counts.attention_bytes(cache, kept=100) == 100 * 256
        assert byte_counts.decode_bytes(cache, 16, kept=100) == self.SCORED * 11 + 25600

    def test_llama_at_3_percent_is_what_the_design_counts(self):
        cache = jax.eval_shape(lambda: init_layer_cache(1, 131072, 8, 128, CONFIG))
        cache = cache.__class__(**vars(cache) | {"quantized": np.array([131072])})
        # 16 bytes of code, a scale of 2, a centroid's share of 2; 512 for the keys and values of 3 %.
        moved = byte_counts.decode_bytes(cache, 0, kept=3 * 8 * 1310)
        assert moved == 8 * (131072 * 20 + 3 * 1310 * 512)

    @pytest.mark.parametrize("tied", [False, True])
    def test_weights(self, tied):
        config = LlamaConfig(
            vocab_size=10, hidden_size=8, mlp_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2,
            norm_eps=1e-5, max_position=64, tie_embeddings=tied,
        )  # fmt: skip
        layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8
        assert byte_counts.weight_bytes(Llama.abstract(config)) == 2 * (2 * layer + 8 + 10 * 8)

    def test_operations_of_a_prefill(self):
        config = LlamaConfig(
            vocab_size=10, hidden_size=8, mlp_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2,
            norm_eps=1e-5, max_position=64,
        )  # fmt: skip
        weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
        pairs = 1 + 2 + 3
        assert prefill.operations(config, 3) == 2 * (2 * weights * 3 + pairs * 4 * 4 * 2)


class TestTiming:
    def test_quartiles(self):
        assert timing.Times.of([5.0, 1.0, 2.0, 3.0, 4.0]) == timing.Times(median=3.0, low=2.0, high=4.0)

    def test_a_step_is_a_loop_divided_by_its_steps(self, results):
        times, state = timing.step_times(lambda i, state, one: state + one, jnp.zeros(()), jnp.ones(()))
        assert state == 2 * (1 + 2)
        assert 0 < times.low <= times.median <= times.high

    def test_loops_that_restart_begin_where_the_first_did(self, results):
        first = jnp.zeros(())
        _, state = timing.step_times(lambda i, state, one: state + one, first, jnp.ones(()), restart=True)
        assert state == 2 and first == 0

    def test_after_keeps_the_array_whatever_its_dtype(self):
        result = (jnp.ones((2, 3)), jnp.ones(2, jnp.int32))
        for array in (jnp.arange(3, dtype=jnp.int8), jnp.arange(3.0)):
            np.testing.assert_array_equal(timing.after(array, result), array)

    def test_the_reading_kernel_reads_all(self):
        blocks = jnp.arange(2.0 * timing.READ_BLOCK)
        largest = timing.READ_BLOCK - 1, 2 * timing.READ_BLOCK - 1
        np.testing.assert_array_equal(timing.read(blocks, name="read"), largest)

    @pytest.mark.kernel
    def test_the_reading_kernel_lowers_at_full_size(self, monkeypatch):
        buffer = jax.ShapeDtypeStruct((timing.STREAM_BYTES // 4,), jnp.float32)
        assert "flush_l2" in kernel_text(monkeypatch, lambda x: timing.read(x, name="flush_l2"), buffer)

    def test_kernels_are_told_apart_by_the_flush_before_each_call(self, monkeypatch):
        found = [
            ("flush_l2", 9.0),
            ("a", 0.001),
            ("b", 0.004),
            ("a", 0.002),
            ("flush_l2", 9.0),
            ("a", 0.002),
            ("b", 0.006),
        ]
        cupti = types.SimpleNamespace(_cupti_init=lambda: None, _cupti_get_timings=lambda finalize: found)
        monkeypatch.setattr(timing.profiler, "mosaic_gpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=cupti))
        monkeypatch.setattr(timing, "on_gpu", lambda: True)
        monkeypatch.setattr(timing, "FLUSH_BYTES", 4 * timing.READ_BLOCK)
        times, kernels = timing.kernel_times(jnp.sin, jnp.ones(3))
        assert times == timing.Times(median=7.5, low=7.25, high=7.75)
        assert kernels == {"a": 2.5, "b": 5.0}


class TestChecks:
    @pytest.mark.parametrize("error", [0.2, float("nan")])
    def test_an_error_is_refused(self, error):
        with pytest.raises(ValueError, match="error of scores must be at most 0.1"):
            check("scores", error, 0.1)

    def test_a_selection_with_a_token_missing_is_refused(self):
        scores = jax.random.normal(jax.random.key(0), (1, 1, 1, 512))
        ends = dict(exact_lse=jnp.zeros((1, 1, 1)), quantized=jnp.array([512]), length=jnp.array([512]))
        choose = jax.jit(select_reference, static_argnames=("sink", "top_p"))
        more, less = (choose(scores, **ends, sink=0, top_p=top_p) for top_p in (0.9, 0.5))
        assert check_superset(more, less) == more.counts[0, 0] / less.counts[0, 0] - 1
        with pytest.raises(ValueError, match="tokens missing"):
            check_superset(less, more)


def test_cases_have_names_of_their_own_and_leave_room():
    cases = [case for suite in SUITES.values() for case in suite]
    longest = "B1-K8-G4-T131072-D128"
    assert len({case.name for case in cases}) == len(cases) - [case.name for case in cases].count(longest) + 1
    for case in cases:
        assert len(case.lengths) == len(case.shares) == case.shape.batch
        assert max(case.lengths) + ROOM <= case.shape.tokens


OPERATIONS = {
    "scores": scores, "top_p": top_p, "gathered_attention": gathered_attention, "decode_attention": decode_attention,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_measured(name, results, monkeypatch):
    monkeypatch.setitem(SUITES, "small", (CASE,))
    assert "No GPU" in run(OPERATIONS[name].main)
    run(OPERATIONS[name].main, "--tokens", "512")
    (row,) = rows_of(results, name)
    environment = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": "abc"}
    assert row | environment == row
    assert row["case"] == "tiny" and row["shape"] == "B2-K1-G2-T1024-D64"
    assert row["kept"] == pytest.approx((0.25 * 832 + 0.4 * 640) / (832 + 640), rel=0.05)
    assert row["top_p"] <= row["estimated_mass"] and 0.85 < row["true_mass"] < 1
    assert row["tb_per_s"] == pytest.approx(row["bytes"] / row["kernel_us"]["median"] / 1e6)
    assert row["share_of_floor"] == pytest.approx(row["tb_per_s"] / row["bandwidth_tb_per_s"])
    for times in (row["kernel_us"], row["wall_us"], row["dense"]["xla"]["kernel_us"], row["dense"]["xla"]["wall_us"]):
        assert 0 < times["low"] <= times["median"] <= times["high"]
    assert row["dense"]["xla"]["bytes"] == 2 * 64 * 2 * (832 + 640)
    about, table = speed_report.operation([row], name)
    assert name in about and len(table) == 3


def test_certified_selection_is_measured_apart(results, monkeypatch):
    monkeypatch.setitem(SUITES, "small", (CASE,))
    run(decode_attention.main, "--selection", "certified", "--top-p", "0.8")
    (row,) = rows_of(results, "decode_attention_certified")
    assert row["selection"] == "certified" and row["overshoot"] == 0 and row["least_true_mass"] > 0.8
    assert 0 <= row["extended"] <= 1 and row["plain"]["kernel_us"]["median"] > 0
    about, table = speed_report.selections([row, row | {"selection": "debiased"}])
    assert row["commit"] in about
    assert len(table) == 4 and "| debiased | 0.8 |" in table[2] and "| certified | 0.8 |" in table[3]
    with pytest.raises(AssertionError):
        run(scores.main, "--selection", "certified")


class TestCertificate:
    """What is made of the head-steps that the benchmark of the certificate measures."""

    def test_a_row_has_means_and_what_fell_short(self):
        steps = {"captured": np.array([0.7, 0.8, 0.9, 1.0]), "kept": np.array([0.1, 0.2, 0.3, 0.4])}
        row = certificate.summarize(steps, 0.85)
        assert row["head_steps"] == 4 and row["short"] == 0.5 and row["least"] == 0.7
        assert row["captured"] == pytest.approx(0.85) and row["kept"] == pytest.approx(0.25)

    def test_plain_selection_has_no_tail(self):
        ways = certificate.choices((0.5, 0.9), 1e-3, ("drop", "mean"))
        assert len(ways) == 2 + 4 + 4
        assert all(RaBitQConfig(**way).tail == way["tail"] for way in ways)

    def test_tables_and_picture(self, tmp_path):
        ways = certificate.choices((0.5, 0.95), 1e-3, ("drop", "mean"))
        base = {
            "captured": 0.97,
            "short": 0.0005,
            "kept": 0.2,
            "verified": 0.96,
            "certified": 0.99,
            "extended": 0.002,
            "bytes_read": 0.3,
            "head_steps": 1000,
        }
        rows = [
            {"heads": heads, **way, **base, "divergence": 0.01, "output_error": 0.1 if way["tail"] == "drop" else 0.05}
            for way in ways
            for heads in ("model", "needle")
        ]
        content = {"rows": rows, "kinds": {"needle": "one token"}}
        table = certificate_report.table(content).split("\n")
        assert len(table) == 2 + 6
        assert (
            "| certified | 0.95 | 0.970 | 0.050% | 0.960 | 99.0% | 0.200% | 20.0% | 30.0% | 1.0e-02 | 10.0% | 5.0% |"
            in table
        )
        hard = certificate_report.hard_table(content, 0.95).split("\n")
        assert hard[2] == "| needle | 1,000 |" + " 0.050% | 20.0% |" * 3
        plots = pytest.importorskip("benchmarks.quality.plots")
        plots.save(certificate_report.draw(content), tmp_path / "certificate.png")
        assert (tmp_path / "certificate.png").stat().st_size > 1000


def test_a_wrong_kernel_is_not_timed(results, monkeypatch):
    monkeypatch.setitem(SUITES, "small", (CASE,))
    monkeypatch.setattr(scores, "implementations", lambda cache: ["wrong"])
    right = scores.IMPLEMENTATIONS["xla"]
    monkeypatch.setitem(scores.IMPLEMENTATIONS, "wrong", lambda *a, length: 1.01 * right(*a, length=length))
    with pytest.raises(ValueError, match="scores by 'wrong'"):
        run(scores.main)
    assert not (results / "cpu").exists()


def test_a_decode_step_is_measured(results):
    output = run(decode_step.main, "--tokens", "1024", "--share", "0.25")
    (row,) = rows_of(results, "decode_step")
    assert row["case"] == "demo B1-T1024" and row["kept"] == pytest.approx(0.25, rel=0.1)
    assert row["bytes"] < row["dense"]["xla"]["bytes"] and row["rest"]["bytes"] < row["bytes"]
    assert f"kept {row['kept']:.2%}" in output
    assert speed_report.decode_step([row])[1][2].startswith("| demo B1-T1024 | ")


def test_a_prefill_is_measured(results):
    run(prefill.main, "--tokens", "512")
    (row,) = rows_of(results, "prefill")
    assert row["operations"] / row["wall_us"]["median"] / 1e6 == pytest.approx(row["tflop_per_s"])
    assert 0 < row["codes_share"] < 1
    assert speed_report.prefill([row])[1][2].startswith("| demo T512 | ")


class TestRows:
    def test_a_row_replaces_its_own_and_drops_those_of_other_commits(self, results):
        for commit, case, value in (("a", "x", 1), ("b", "x", 2), ("b", "y", 3), ("b", "x", 4)):
            record.write_row("rows.json", {"case": case, "value": value}, commit=commit)
        assert [(row["case"], row["value"]) for row in rows_of(results, "rows")] == [("y", 3), ("x", 4)]

    def test_a_report_of_new_results(self, results, monkeypatch):
        times = {"median": 20.0, "low": 19.0, "high": 21.0}
        row = {
            "device": "GPU", "jax": "0.11.2", "commit": "abc", "command": "python -m benchmarks.decode_attention",
            "implementation": "kernels", "top_p": 0.95, "kept": 0.03, "true_mass": 0.9, "kernel_us": times,
            "wall_us": times, "floor_us": 10.0, "tb_per_s": 2.0, "share_of_floor": 0.5,
            "kernels_us": {"score_bins_mosaic_gpu_kernel": 10.0, "top_p_mark": 3.0, "loop_fusion": 7.0},
            "dense": {"xla": {"kernel_us": times, "wall_us": {"median": 200.0}}},
            "overshoot": 0.02, "quantization": {"share_of_step": 0.004},
        }  # fmt: skip
        shapes = ("B1-K8-G4-T8192-D128", "B8-K8-G4-T131072-D128", "B1-K8-G3-T131072-D64")
        rows = [row | {"case": shape, "shape": shape} for shape in shapes]
        monkeypatch.setattr(report, "RESULTS", results)
        (results / "training.json").write_text((ROOT / "benchmarks/results/training.json").read_text())
        for name in ("decode_attention.json", "scores.json"):
            (results / name).write_text(json.dumps(rows))
        made = report.sections()
        assert "8 x 128K tokens on an GPU: **20 µs instead of 200 µs**" in made["headline"].replace("\n", " ")
        line = (
            "| 1 x 128K, G = 3, D = 64 | 3.0% | 2.0% | 90% | 20.0 (19.0 to 21.0) | 50% | 0.4% | 20 | 200 | - | 10.00 |"
        )
        assert line in made["results"]
        assert "scores.json](results/scores.json)" in made["operations"]
        plots = pytest.importorskip("benchmarks.speed_plots")
        plots.draw(rows, results / "speed.png")
        assert (results / "speed.png").stat().st_size > 1000
        assert plots.stage_times(row["kernels_us"]) == {
            "scores": 10.0, "selection": 3.0, "attention": 0.0, plots.REST: 7.0,
        }  # fmt: skip


def test_a_timeline_counts_what_overlaps_once():
    """Two steps: two kernels that overlap, a gap, a copy to the host, in nanoseconds."""
    events = [(0, 4000, "a", True), (2000, 6000, "b", True), (3000, 5000, "a", True), (9000, 10000, "MemcpyD2H", False)]
    line = timing.summarize(events, steps=2)
    assert (line.busy_us, line.launches, line.in_graphs, line.to_host) == (3.5, 2, 0.75, 0.5)
    assert list(line.kernels_us.items()) == [("a", 3.0), ("b", 2.0), ("MemcpyD2H", 0.5)]


def test_pages_have_the_numbers_of_the_results():
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        assert re.search("<!-- (results|operations) -->", text)
        assert report.rewritten(text) == text
