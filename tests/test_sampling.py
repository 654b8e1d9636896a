import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabitq_jax import Sampling
from rabitq_jax.sampling import sample

PROBABILITY = np.array([0.4, 0.3, 0.2, 0.1])
LOGITS = jnp.log(jnp.asarray(PROBABILITY, jnp.float32))


def frequencies(sampling, draws=20000):
    tokens = sample(jnp.tile(LOGITS, (draws, 1)), sampling, jax.random.key(0))
    return np.bincount(tokens, minlength=4) / draws


def test_greedy_takes_the_most_likely_token():
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
    np.testing.assert_array_equal(sample(logits, Sampling(), jax.random.key(0)), [1, 0])


@pytest.mark.parametrize(
    "sampling,expected",
    [
        (Sampling(temperature=1.0), PROBABILITY),
        (Sampling(temperature=0.5), PROBABILITY**2 / sum(PROBABILITY**2)),
        (Sampling(temperature=1.0, top_k=2), np.array([4, 3, 0, 0]) / 7),
        # 0.4 + 0.3 is below 0.75, so the third token crosses it and is kept.
        (Sampling(temperature=1.0, top_p=0.75), np.array([4, 3, 2, 0]) / 9),
        (Sampling(temperature=1.0, top_p=0.01), np.array([1, 0, 0, 0])),
        # Top-p applies to what top-k left: 4/7 is above 0.5.
        (Sampling(temperature=1.0, top_k=2, top_p=0.5), np.array([1, 0, 0, 0])),
        (Sampling(temperature=1.0, top_k=100, top_p=1.0), PROBABILITY),
    ],
)
def test_frequencies(sampling, expected):
    # Five standard errors of 20,000 draws on four tokens: a false alarm in fewer than 1 in 400,000 runs a case.
    np.testing.assert_allclose(frequencies(sampling), expected, atol=5 * 0.5 / np.sqrt(20000))
    np.testing.assert_array_equal(frequencies(sampling) > 0, expected > 0)


@pytest.mark.parametrize(
    "name,value", [("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_refuses_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})
