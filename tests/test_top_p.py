"""The definition of Top-p, on scores whose answer is known or found by hand in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from rabitq_jax import top_p

NOTHING = -np.inf


def select(scores, exact_lse=NOTHING, *, quantized=None, length=None, sink=0, p, implementation="xla"):
    """scores [G,T] of one kv head; everything is scored by default."""
    scores = np.asarray(scores, np.float32)
    quantized = scores.shape[1] if quantized is None else quantized
    length = quantized if length is None else length
    chosen = top_p.select_top_p(
        jnp.asarray(scores)[None, None], jnp.full((1, 1, len(scores)), exact_lse), jnp.array([quantized]),
        jnp.array([length]), sink=sink, top_p=p, implementation=implementation,
    )  # fmt: skip
    return chosen.indices[0, 0, : chosen.counts[0, 0]].tolist(), chosen


def logs(*shares):
    return [[np.log(share) for share in shares]]


def test_the_token_that_crosses_p_is_kept():
    shares = logs(0.1, 0.4, 0.05, 0.3, 0.15)
    assert select(shares, p=0.35)[0] == [1]
    assert select(shares, p=0.45)[0] == [1, 3]
    assert select(shares, p=0.75)[0] == [1, 3, 4]
    assert select(shares, p=0.97)[0] == [0, 1, 2, 3, 4]


def test_mass_that_reaches_p_exactly_is_enough():
    # exp(0) and sums of it have no rounding.
    indices, chosen = select(np.zeros((1, 4)), p=0.5)
    assert indices == [0, 1] and chosen.mass[0, 0, 0] == 0.5


def test_ties_are_kept_by_position():
    assert select([[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]], p=0.75)[0] == [0, 1, 2, 4]
    assert select(np.zeros((1, 10)), p=0.35)[0] == [0, 1, 2, 3]


def test_random_scores_give_the_smallest_set():
    rng = np.random.default_rng(0)
    for p in (0.05, 0.5, 0.9, 0.99):
        scores = 3 * rng.normal(size=300)
        order = np.argsort(-scores)
        mass = np.cumsum(np.exp(scores[order]) / np.exp(scores).sum())
        needed = int(np.searchsorted(mass, p)) + 1
        indices, chosen = select(scores[None], p=p)
        assert indices == sorted(order[:needed].tolist())
        np.testing.assert_allclose(chosen.mass[0, 0, 0], mass[needed - 1], atol=1e-5)


def test_p_one_keeps_tokens_without_weight():
    indices, chosen = select([[0.0, -200.0, -1000.0, 5.0]], p=1.0)
    assert indices == [0, 1, 2, 3] and chosen.mass[0, 0, 0] == 1


def test_exact_mass_counts_when_p_is_over_all_tokens():
    shares = logs(0.4, 0.3, 0.2, 0.1)
    # Exact tokens as heavy as all scored ones: 0.5 of the whole is there before any is kept.
    assert select(shares, 0.0, p=0.5 - 1e-6)[0] == []
    assert select(shares, 0.0, p=0.6)[0] == [0]
    assert select(shares, 0.0, p=0.8)[0] == [0, 1]
    assert select(shares, NOTHING, p=0.6)[0] == [0, 1]
    chosen = select(shares, 0.0, p=0.6)[1]
    np.testing.assert_allclose(chosen.mass[0, 0, 0], 0.7, atol=1e-6)


def test_sinks_and_window_are_attended_and_not_scored():
    scores = np.full((1, 12), -5.0)
    scores[0, [0, 6, 9]] = 50.0, 1.0, 50.0
    indices, chosen = select(scores, quantized=8, length=10, sink=2, p=0.5)
    assert indices == [0, 1, 6, 8, 9]
    assert chosen.scored[0, 0, 0] == 1


def test_union_over_the_group():
    """Each query head has its own threshold; the kv head attends what any of them keeps."""
    scores = np.zeros((3, 8))
    scores[0, 2], scores[1, 5], scores[2, [2, 7]] = 20.0, 30.0, 25.0
    indices, chosen = select(scores, p=0.9)
    assert indices == [2, 5, 7]
    assert chosen.scored[0, 0].tolist() == [1, 1, 2]


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_nothing_scored(implementation):
    indices, chosen = select(np.zeros((2, 512)), quantized=0, length=40, sink=4, p=0.9, implementation=implementation)
    assert indices == list(range(40))
    assert chosen.mass[0, 0].tolist() == [1.0, 1.0] and chosen.scored[0, 0].tolist() == [0, 0]


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_sinks_beyond_the_length(implementation):
    indices, _ = select(np.zeros((1, 512)), quantized=0, length=3, sink=16, p=0.9, implementation=implementation)
    assert indices == [0, 1, 2]


def test_garbage_outside_the_scored_range_is_ignored():
    scores = np.zeros((1, 64))
    clean = select(scores, quantized=32, length=40, sink=4, p=0.5)[0]
    for garbage in (np.nan, np.inf, 1e30):
        scores[0, 32:], scores[0, :4] = garbage, garbage
        assert select(scores, quantized=32, length=40, sink=4, p=0.5)[0] == clean


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'sort'"):
        select(np.zeros((1, 8)), p=0.5, implementation="sort")
