"""What all retrieval methods owe: full budgets are dense attention, budgets hold, one program serves every step."""

import numpy as np
import pytest

from tests.selector_cases import BATCH, CASES, GROUP, KV_HEADS, PROMPT, STEPS, attend, history, places, run

SPARSE = [name for name in CASES if name != "full"]


@pytest.mark.parametrize("name", CASES)
def test_a_full_budget_is_dense_attention(name):
    ran = run(CASES[name].whole)
    for step, b, k in places():
        seen = history(step, b, k)
        assert ran.kept(step, b, k) == set(range(len(seen.keys)))
        expected = attend(seen, range(len(seen.keys)))
        np.testing.assert_allclose(ran.out[step, b, k * GROUP : (k + 1) * GROUP], expected, atol=2e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_the_output_is_attention_to_what_was_chosen(name):
    ran = run(CASES[name].small)
    for step, b, k in places():
        expected = attend(history(step, b, k), ran.kept(step, b, k))
        np.testing.assert_allclose(ran.out[step, b, k * GROUP : (k + 1) * GROUP], expected, atol=2e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_budgets_hold_and_sinks_and_window_are_kept(name):
    ran = run(CASES[name].small)
    length = PROMPT + 1 + np.arange(STEPS)[:, None]
    counts = ran.selection.counts
    assert np.all(counts <= np.minimum(CASES[name].most, length[..., None]))
    assert np.all(counts[-1, 0] < length[-1, 0] * 0.8)
    sink, recent = CASES[name].sink, CASES[name].recent
    for step in range(STEPS):
        for b in range(BATCH):
            held = length[step, b]
            owed = {*range(min(sink, held)), *range(max(held - recent, 0), held)}
            for k in range(KV_HEADS):
                kept = ran.selection.indices[step, b, k, : counts[step, b, k]]
                assert owed <= set(kept.tolist()) and np.all(np.diff(kept) > 0) and kept[-1] == held - 1
