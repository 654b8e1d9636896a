"""Each retrieval method against its paper's rule in a few lines of float64 NumPy."""

import numpy as np
import pytest

from tests.selector_cases import CASES, history, largest, places, run


def union(scores, count: int, sink: int, recent: int, length: int, page: int = 1) -> set[int]:
    """Sinks, window, and the tokens in each query head's `count` best pages; scores [G,pages]."""
    stop = (length - recent) // page * page
    best = set().union(*(largest(head, count, sink // page, max(stop, 0) // page) for head in scores))
    tokens = {page * p + i for p in best for i in range(page)}
    return (tokens | set(range(sink)) | set(range(max(stop, 0), length))) & set(range(length))


def top_p(weights, p: float, scored) -> set[int]:
    """The fewest of the scored tokens that, with all others, hold p of one head's weights."""
    order = sorted(scored, key=lambda i: -weights[i])
    mass, kept = weights.sum() - weights[order].sum(), set()
    for i in order:
        if mass >= p * weights.sum():
            break
        kept.add(i)
        mass += weights[i]
    return kept


def check(name, rule):
    """`rule(history)` is the set of tokens that a kv head attends."""
    for step, b, k in places():
        assert run(CASES[name].small).kept(step, b, k) == rule(history(step, b, k)), (step, b, k)


def test_oracle_top_k_keeps_the_largest_logits():
    check("oracle-top-k", lambda seen: union(seen.logits, 28, 4, 8, len(seen.keys)))


@pytest.mark.parametrize("name", ["oracle-top-p", "oracle-both"])
def test_oracle_top_p_keeps_the_fewest_tokens_that_hold_p(name):
    def rule(seen):
        length = len(seen.keys)
        exact = union(seen.logits, 0, 4, 8, length)
        kept = set(exact)
        for logits in seen.logits:
            scored = set(range(length)) - exact
            if name == "oracle-both":
                scored = largest(logits, 28, 4, max(length - 8, 0)) - exact
            weights = np.exp(logits)
            weights[list(set(range(length)) - exact - scored)] = 0
            kept |= top_p(weights, 0.7, scored)
        return kept

    check(name, rule)


def test_streaming_llm_keeps_sinks_and_window():
    check("streaming-llm", lambda seen: {i for i in range(len(seen.keys)) if i < 4 or i >= len(seen.keys) - 24})


def test_quest_ranks_pages_by_the_bound_of_their_channels():
    def rule(seen):
        pages = [seen.keys[i : i + 8] for i in range(0, len(seen.keys), 8)]
        bound = [np.maximum(seen.query * page.min(axis=0), seen.query * page.max(axis=0)).sum(axis=1) for page in pages]
        assert all(
            np.all(top + 1e-9 >= (seen.query @ page.T).max(axis=1)) for top, page in zip(bound, pages, strict=True)
        )
        return union(np.stack(bound, axis=1), 3, 8, 8, len(seen.keys), page=8)

    check("quest", rule)
