"""Frequent words, RULER's aggregation task: a text of made-up words alone, in which three come up most often."""

import numpy as np

from benchmarks.quality.facts import Fact, distinct, random_word

VOCABULARY = 100
ZIPF_EXPONENT = 2.0
ASKED = 3


def word_count_text(size: int, rng: np.random.Generator) -> tuple[bytes, Fact]:
    """A text of at least `size` bytes of words drawn by Zipf's law, and the question for the three most frequent.

    RULER (arXiv 2404.06654, section 3.3) draws with exponent 2, from a vocabulary that grows with the text.
    """
    words = distinct(random_word, VOCABULARY, rng)
    weights = np.arange(1, VOCABULARY + 1) ** -ZIPF_EXPONENT
    # No word is shorter than four letters.
    drawn = rng.choice(VOCABULARY, size // 5 + 1, p=weights / weights.sum())
    text = (" ".join(words[i] for i in drawn) + " ")[: size - 1].encode() + b"\n"
    order = np.argsort(-np.bincount(drawn, minlength=VOCABULARY), stable=True)
    frequent = tuple(words[i] for i in order[:ASKED])
    return text, Fact(
        needles=(), question="What are the three most frequent words?", answer=", ".join(frequent), values=frequent
    )
