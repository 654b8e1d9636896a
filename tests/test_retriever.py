"""The model that comes with the library: what it is, and that it finds what it was trained to find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality import evaluate, tasks
from benchmarks.quality.train import CONFIG
from models import RETRIEVER, load_pretrained
from rabitq_jax import RaBitQConfig

TOKENS = 900


@pytest.fixture(scope="module")
def retriever():
    return load_pretrained(RETRIEVER, dtype=jnp.float32, progress=False)


def test_is_small_and_of_the_shape_that_is_trained(retriever):
    model, tokenizer = retriever
    assert (RETRIEVER / "model.safetensors").stat().st_size < 15e6
    shape = {name: getattr(model.config, name) for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim")}
    assert shape == {name: getattr(CONFIG, name) for name in shape}
    text = "def naïve(x): return “x”\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text.encode()) + 1


def test_finds_facts_densely_and_with_codes(retriever):
    model, tokenizer = retriever
    names = ("single-number", "multi-key", "variables")
    problems = [p for name in names for p in tasks.make_problems(tasks.TASKS[name], TOKENS, 2, tokenizer)]
    configs = [None, RaBitQConfig(dense_layers=0)]
    dense, sparse = evaluate.answer(model, tokenizer, problems, configs, key=jax.random.key(0))
    for answered in (dense, sparse):
        wrong = [(one.problem.answers, one.reply) for one in answered if not one.score]
        assert not wrong
    # Sinks and window alone are a tenth of this short text and more.
    assert np.mean([one.kept for one in sparse]) < 0.4
