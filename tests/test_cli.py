"""The command line, run on a checkpoint in a folder."""

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from benchmarks.make_checkpoint import SHAPES, make_checkpoint
from rabitq_jax.cli import commands, main
from rabitq_jax.selectors import DoubleSparsity, make_selector

PROMPT = "We the People of the United States, in Order to form a more perfect Union, establish Justice. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), SHAPES["demo"])


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    file.write_text(PROMPT)
    return file


def generate(folder, prompt_file, *options):
    command = ["generate", "--model", str(folder), "--prompt-file", str(prompt_file), "--dtype", "float32"]
    return CliRunner().invoke(commands, [*command, "--max-new-tokens", "8", *options], catch_exceptions=False)


def test_generate_streams_text_and_ends_with_one_line(folder, prompt_file):
    run = generate(folder, prompt_file, "--dense-layers", "1", "--top-p", "0.5")
    assert run.exit_code == 0
    assert re.fullmatch(r"[ -~]{8}\n", run.stdout)
    assert "Loading: 100%" in run.stderr and "prefill: 100%" in run.stderr
    tokens = len(PROMPT) + 1
    closing = run.stderr.splitlines()[-1]
    pattern = (
        rf"{tokens:,} prompt tokens, 8 new \| prefill [\d,]+ tokens/s, decode [\d,.]+ tokens/s \(compiling, [\d.]+ s, "
        r"apart\) \| kept ([\d.]+)% of tokens, read ([\d.]+)% of dense attention's bytes"
    )
    match = re.fullmatch(pattern, closing)
    assert match, closing
    assert 25 < float(match[1]) < 100 and 25 < float(match[2]) < 100


def test_certified_decoding_says_what_it_verified(folder, prompt_file):
    options = ("--dense-layers", "1", "--top-p", "0.5", "--selection", "certified", "--failure-rate", "0.01")
    run = generate(folder, prompt_file, *options, "--tail", "mean")
    match = re.search(
        r", verified ([\d.]+)% of the attention, p certified in ([\d.]+)% of head-steps$", run.stderr.strip()
    )
    assert match, run.stderr
    assert 50 < float(match[1]) <= 100 and 50 < float(match[2]) <= 100


def test_dense_and_p_one_print_the_same_text(folder, prompt_file):
    dense, exact = generate(folder, prompt_file, "--dense"), generate(folder, prompt_file, "--top-p", "1")
    assert dense.stdout == exact.stdout
    assert "kept 100.0% of tokens, read 100.0%" in dense.stderr


def test_the_seed_decides_what_is_drawn(folder, prompt_file):
    draws = [generate(folder, prompt_file, "--dense", "--temperature", "1", "--seed", s).stdout for s in "112"]
    assert draws[0] == draws[1] != draws[2]


def test_inspect_shows_model_cache_and_codes(folder):
    command = ["inspect", "--model", str(folder), "--context", "8192", "--dtype", "bfloat16"]
    run = CliRunner().invoke(commands, command, catch_exceptions=False)
    # 4 layers, keys and values, 2 kv heads, 8192 tokens, 64 dimensions, 2 bytes.
    assert f"cache         {4 * 2 * 2 * 8192 * 64 * 2 / 1e9:.3f} GB for 1 x 8,192 tokens in bfloat16" in run.output
    assert re.search(r"codes         0\.00\d GB more, 4\.\d% of the cache", run.output)
    assert "8 query, 2 key-value, of 64 dimensions" in run.output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--model", "no/such/folder"], "does not exist"),
        (["--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["--failure-rate", "0.7"], "failure_rate must be in (0, 0.5), got 0.7"),
        (["--tail", "mean"], "selection must be 'debiased' or 'certified' for tail 'mean', got 'plain'"),
        (["--temperature", "-1"], "temperature must be"),
        (["--chat"], "no chat template"),
    ],
)
def test_errors_are_one_line(folder, prompt_file, arguments, message, monkeypatch, capsys):
    command = ["rabitq-jax", "generate", "--model", str(folder), "--prompt-file", str(prompt_file), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Error: ") and message in error


def test_inspect_names_what_is_wrong_with_a_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["rabitq-jax", "inspect", "--model", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "config.json names neither architectures nor a model_type" in capsys.readouterr().err


def test_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "rabitq_jax", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in run.stdout and "inspect" in run.stdout


def test_another_method_and_its_arguments(folder, prompt_file):
    full = generate(folder, prompt_file, "--selector", "full")
    quest = generate(folder, prompt_file, "--selector", "quest", "--selector-args", "page=8,budget=4096")
    assert full.stdout == quest.stdout
    # Bounds of pages of 8 tokens on top of every token's key and value.
    assert "kept 100.0% of tokens, read 100.0%" in full.stderr and "kept 100.0% of tokens, read 11" in quest.stderr


@pytest.mark.parametrize(
    "options,message",
    [
        (("--selector", "quest", "--top-p", "0.5"), "in --selector-args, got --top-p too"),
        (("--selector-args", "page=8"), "--selector-args needs --selector"),
        (("--selector", "quest", "--selector-args", "pages=8"), "Quest has no argument 'pages'"),
        (("--selector", "quest", "--selector-args", "page=8,sink"), "must be name=value"),
        (("--selector", "quest", "--selector-args", "page=8,sink=4"), "sink must be a multiple of page 8, got 4"),
        (("--selector", "oracle-top-p", "--selector-args", "top_p=1.5"), "top_p must be in (0, 1], got 1.5"),
    ],
)
def test_a_method_s_wrong_arguments_are_named(folder, prompt_file, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(folder, prompt_file, *options)


def test_selectors_are_listed_with_their_bytes():
    run = CliRunner().invoke(commands, ["selectors", "--head-dim", "64"], catch_exceptions=False)
    assert re.search(r"^rabitq +11\.0  RaBitQ", run.output, re.MULTILINE)
    assert re.search(r"^quest +16\.0  Quest: pages of tokens", run.output, re.MULTILINE)


def test_calibration_names_a_folder_that_is_not_there(folder, prompt_file, tmp_path):
    command = ["calibrate", "--model", str(folder), "--text-file", str(prompt_file)]
    with pytest.raises(ValueError, match="--output must be in a folder that exists, got .*none/channels.json"):
        CliRunner().invoke(
            commands, [*command, "--output", str(tmp_path / "none/channels.json")], catch_exceptions=False
        )


def test_calibrated_channels_are_written(folder, prompt_file, tmp_path):
    output = tmp_path / "channels.json"
    command = ["calibrate", "--model", str(folder), "--text-file", str(prompt_file), "--channels", "8"]
    run = CliRunner().invoke(commands, [*command, "--tokens", "300", "--output", str(output)], catch_exceptions=False)
    assert "8 channels of 4 layers x 2 kv heads, from 300 tokens" in run.output
    selector = make_selector("double-sparsity", calibrated=str(output))
    assert isinstance(selector, DoubleSparsity) and selector.channels == 8
    assert [len(layer) for layer in selector.calibrated] == [2] * 4
