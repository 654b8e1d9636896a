"""Every retrieval method: its paper's rule, its budget, full budgets that are dense attention, one program a method."""

import numpy as np
import pytest

from tests.selector_cases import BATCH, CASES, GROUP, KV_HEADS, PROMPT, STEPS, attend, history, places, run
from tests.selector_rules import OUTPUTS, RULES


@pytest.mark.parametrize("name", CASES)
def test_a_full_budget_is_dense_attention(name):
    ran = run(CASES[name].whole, 40)
    for step, b, k in places(40):
        seen = history(step, b, k)
        assert ran.kept(step, b, k) == set(range(len(seen.keys)))
        expected = attend(seen, range(len(seen.keys)))
        np.testing.assert_allclose(ran.out[step, b, k * GROUP : (k + 1) * GROUP], expected, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_small_budget_is_the_papers_rule(name):
    ran = run(CASES[name].small, STEPS)
    for step, b, k in places(STEPS):
        seen, kept = history(step, b, k), ran.kept(step, b, k)
        assert kept == RULES[name](seen, ran, b, k), (step, b, k)
        expected = OUTPUTS[name](seen, kept, ran, b, k) if name in OUTPUTS else attend(seen, kept)
        np.testing.assert_allclose(ran.out[step, b, k * GROUP : (k + 1) * GROUP], expected, atol=1e-4)
    check_budget(ran, CASES[name])


def check_budget(ran, case):
    """Never more than the budget; lists are in order, and hold sinks and window."""
    length = PROMPT + 1 + np.arange(STEPS)[:, None]
    counts = ran.counts
    assert np.all(counts <= np.minimum(case.most, length[..., None]))
    for step in range(STEPS):
        for b in range(BATCH):
            held = length[step, b]
            owed = {*range(min(case.sink, held)), *range(max(held - case.recent, 0), held)}
            for k in range(KV_HEADS):
                kept = ran.indices[step, b, k, : counts[step, b, k]]
                assert owed <= set(kept.tolist()) and np.all(np.diff(kept) > 0) and kept[-1] == held - 1
