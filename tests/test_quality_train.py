"""Training of the retrieval model: batches by step alone, and a stopped run that goes on as if it had not stopped."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import record
from benchmarks.byte_tokenizer import byte_tokenizer
from benchmarks.quality import train
from models import load_pretrained

TINY = dataclasses.replace(
    train.CONFIG, hidden_size=32, mlp_size=48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16
)
STAGES = (train.Stage(tokens=96, batch=2, steps=3), train.Stage(tokens=160, batch=1, steps=2))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "environment", lambda commit: {"commit": commit})
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    return tmp_path / "results" / "training.json"


def history(path):
    """Without the wall time."""
    entries = json.loads(path.read_text())["history"]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def test_batch_is_that_of_its_step():
    tokens, is_answer = train.make_batch(4, 300, 3)
    again, _ = train.make_batch(4, 300, 3)
    other, _ = train.make_batch(5, 300, 3)
    assert tokens.shape == is_answer.shape == (3, 301) and tokens.dtype == np.int32
    assert np.array_equal(tokens, again) and not np.array_equal(tokens, other)
    assert (tokens[:, 0] == byte_tokenizer().token_to_id("<|begin_of_text|>")).all() and not is_answer[:, 0].any()
    text = byte_tokenizer().decode(tokens[0, is_answer[0]].tolist())
    assert text.startswith(" ") and text.endswith("\n")


def test_stopped_run_goes_on_as_if_it_had_not(tmp_path, results):
    train.train(TINY, STAGES, tmp_path / "whole", workers=1, commit="abc")
    whole = history(results)
    assert [(entry["step"], entry["tokens"]) for entry in whole] == [(1, 96), (2, 96), (3, 96), (4, 160), (5, 160)]
    # Stopped after its first step.
    train.train(TINY, STAGES, tmp_path / "parts", workers=1, stop_after=0.0, commit="abc")
    assert history(results) == whole[:1]
    train.train(TINY, STAGES, tmp_path / "parts", workers=1, commit="abc")
    assert history(results) == whole
    models = [load_pretrained(tmp_path / run / "model", progress=False) for run in ("whole", "parts")]
    for one, other in zip(*(jax.tree.leaves(nnx.state(model)) for model, _ in models), strict=True):
        assert one.dtype == jnp.bfloat16 and jnp.array_equal(one, other)
    ids = models[0][1].encode("text")
    assert models[0][1].decode(ids) == "text" and len(ids) == 5


def test_losses_weigh_answers_and_text():
    model = train.new_model(TINY)
    definition, params = nnx.split(model)
    tokens, is_answer = train.make_batch(0, 200, 4)
    assert is_answer.any()
    total, (answers, text, right) = train.losses(definition, params, tokens, is_answer)
    assert float(total) == pytest.approx(float(answers) + train.TEXT_WEIGHT * float(text), rel=1e-5)
    # A new model knows nothing: logits of unit deviation cost half a nat more than none.
    assert float(answers) == pytest.approx(np.log(TINY.vocab_size) + 0.5, abs=1.5) and 0 <= float(right) < 0.2


def test_learning_rate_rises_stays_and_falls():
    rate = train.learning_rate(4000)
    assert rate(0) == 0 and rate(train.WARMUP) == rate(2999) == pytest.approx(train.LEARNING_RATE)
    assert rate(3500) == pytest.approx(train.LEARNING_RATE / 2) and rate(4000) == pytest.approx(0)


def test_new_model_writes_little_to_the_residual_stream():
    config = dataclasses.replace(TINY, hidden_size=128, num_layers=2)
    weights = {
        ".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(train.new_model(config)))
    }
    assert float(jnp.std(weights["layers.0.self_attn.qkv_proj.weight"])) == pytest.approx(128**-0.5, rel=1e-3)
    assert float(jnp.std(weights["layers.1.mlp.down_proj.weight"])) == pytest.approx(48**-0.5 / 2, rel=1e-3)
