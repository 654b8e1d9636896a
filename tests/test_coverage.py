"""What selection "certified" promises, counted: 102,400 head-steps on heads that were made to break it.

Seeds are fixed, so a test passes or fails for good. A count of failures is refused if a true rate of `failure_rate`
would reach it with probability 1e-4 at most (exact binomial test): that is the false-alarm rate of a fresh seed, for
head-steps that do not depend on each other. 32 of them share a rotation.
"""

import jax
import numpy as np
import pytest
from scipy.stats import binom

from benchmarks import hard_heads
from benchmarks.hard_heads import KINDS, KV_HEADS, QUERIES, measure_kind
from rabitq_jax import RaBitQConfig, noisy_scores

pytestmark = pytest.mark.optimized

TOKENS = 1024
FEW, MANY = 1280, 20480
FALSE_ALARM = 1e-4


def measure(kind, head_steps, *, tokens=TOKENS, size=2.0, grouped=False, **choices):
    """Arrays of so many head-steps."""
    rotations = head_steps // (KV_HEADS * QUERIES)
    return measure_kind(jax.random.key(0), kind, tokens, rotations, RaBitQConfig(**choices), grouped=grouped, size=size)


def refused(failures, head_steps, failure_rate):
    """Whether so many failures say that the true rate is above failure_rate."""
    return failures > 0 and binom.sf(failures - 1, head_steps, failure_rate) < FALSE_ALARM


def test_certified_selection_holds_p():
    """On every kind; the plain rule's shortfall beside it."""
    p, failure_rate = 0.95, 1e-3
    kept = {}
    for kind in KINDS:
        found = measure(kind, MANY, tokens=512, top_p=p, selection="certified", failure_rate=failure_rate)
        failures = np.sum(found["captured"] < p)
        assert not refused(failures, MANY, failure_rate), (kind, failures)
        # What is verified is what is captured.
        difference = found["verified"] - found["captured"]
        assert abs(difference.mean()) < 0.002 and np.sqrt(np.mean(difference**2)) < 0.01, kind
        # The bound is one, and of some use.
        assert np.mean(found["captured"] < found["bound"]) < 5 * failure_rate, kind
        # Nearly all heads are shown to hold p, and few take a second round for it.
        assert np.mean(found["certified"]) > 0.99 and np.mean(found["extended"]) < 0.1, kind
        plain = measure(kind, FEW, tokens=512, top_p=p)
        assert np.mean(plain["captured"] < p) > 100 * failure_rate, kind
        assert plain["kept"].mean() < found["kept"].mean() < 0.8, kind
        kept[kind] = found["own_kept"].mean()

    # A larger failure rate keeps less. Aligned heads, whose errors depend on each other, come nearest to theirs.
    found = measure("aligned", 5120, tokens=512, top_p=p, selection="certified", failure_rate=1e-2)
    assert not refused(np.sum(found["captured"] < p), 5120, 1e-2)
    assert found["own_kept"].mean() < 0.98 * kept["aligned"]


def test_count_of_failures_would_show_a_wrong_error_model(monkeypatch):
    """With half the noise assumed, the same count refuses the promise."""
    noise_gain = noisy_scores.noise_gain
    monkeypatch.setattr(noisy_scores, "noise_gain", lambda *args, **kwargs: 0.5 * noise_gain(*args, **kwargs))
    hard_heads._measure.clear_cache()
    found = measure("random", FEW, top_p=0.95, selection="certified")
    hard_heads._measure.clear_cache()
    assert refused(np.sum(found["captured"] < 0.95), FEW, 1e-3)


def test_verified_mass_is_the_true_mass():
    """From p = 0.5 to 0.999, on average and to 0.01, whatever the logits' spread and with errors in common."""
    for p in (0.5, 0.999):
        for kind in ("heavy-tailed", "aligned"):
            found = measure(kind, FEW, top_p=p, selection="certified")
            assert abs(found["verified"].mean() - found["captured"].mean()) < 0.01, (kind, p)


def test_debiased_selection_delivers_what_it_claims():
    """To 0.01 from p = 0.5 to 0.999 where the noise is below a nat; with more, a low p delivers more than it claims:
    the mean of a few heavy weights lies above their median."""
    for p in (0.5, 0.999):
        little, much = (measure("random", FEW, size=size, top_p=p, selection="debiased") for size in (1.0, 2.0))
        assert p - 0.001 < little["claimed"].mean() < p + 0.025
        assert abs(little["captured"].mean() - little["claimed"].mean()) < 0.01
        assert abs(little["verified"].mean() - little["captured"].mean()) < 0.01
        assert much["captured"].mean() > p - 0.001
        if p == 0.5:
            assert 0.02 < much["captured"].mean() - much["claimed"].mean() < 0.1


def test_a_group_attends_to_the_union():
    """Four query heads a kv head: verified and bound speak of what all of them together have selected."""
    choices = dict(top_p=0.95, selection="certified")
    alone, found = (measure("low rank", FEW, grouped=grouped, **choices) for grouped in (False, True))
    assert not refused(np.sum(found["captured"] < 0.95), FEW, 1e-3)
    assert abs(found["verified"].mean() - found["captured"].mean()) < 0.005
    assert found["captured"].mean() > alone["captured"].mean() + 0.005
    assert found["kept"].mean() > 1.2 * alone["kept"].mean()
    assert found["extended"].mean() < 0.5 * alone["extended"].mean()
