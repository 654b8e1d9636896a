"""generate at p = 1 against greedy tokens of transformers, with codes, selection and gathered attention at work."""

import jax
import numpy as np
import pytest

from rabitq_jax import RaBitQConfig, generate
from tests.checkpoints import load
from tests.parity.cases import CASES, NEW_TOKENS, make_folder, reference

CONFIG = RaBitQConfig(top_p=1.0, sink=4, recent=8, interval=16, dense_layers=0)


@pytest.mark.filterwarnings("ignore:prompt and new tokens make:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_tokens_at_p_one_are_those_of_transformers(case, tmp_path):
    model, want = load(make_folder(case, tmp_path)), reference(case)
    out = generate(model, want.prompt, CONFIG, max_new_tokens=NEW_TOKENS, key=jax.random.key(0))
    assert out.tokens[0].tolist() == want.greedy_tokens.tolist()
    quantized = np.asarray(out.cache.layers[0].quantized)
    assert quantized[0] == CONFIG.quantized_length(len(want.prompt) + NEW_TOKENS) > 0
