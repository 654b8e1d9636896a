"""Retrieval methods over one cache: each says which cached tokens a decode step attends, and what finding them reads.

    generate(model, prompt, Quest(rule=TopK(budget=1024)), max_new_tokens=64, key=key)
    generate(model, prompt, make_selector("quest", page=16, budget=1024), ...)

RaBitQ, the default method, is `RaBitQConfig`: it has kernels of its own, and stands in the same table.
"""

from rabitq_jax.config import RaBitQConfig
from rabitq_jax.selectors.budget import Rule, TopK, TopKThenTopP, TopP
from rabitq_jax.selectors.full import FullAttention
from rabitq_jax.selectors.oracle import OracleTopK, OracleTopP
from rabitq_jax.selectors.quest import Quest
from rabitq_jax.selectors.selector import Attended, CacheShape, Choice, ScoringSelector, Selector, Step
from rabitq_jax.selectors.streaming_llm import StreamingLLM

SELECTORS: dict[str, type[Selector]] = {
    "full": FullAttention,
    "oracle-top-k": OracleTopK,
    "oracle-top-p": OracleTopP,
    "streaming-llm": StreamingLLM,
    "quest": Quest,
}


def make_selector(name: str, **arguments) -> RaBitQConfig | Selector:
    """A method by its name; "rabitq" makes a RaBitQConfig.

    Args:
      arguments: fields of its class. Methods that score take budget=, top_p= or both for their rule.

    Raises:
      ValueError: there is no method of this name, or an argument is wrong.
    """
    if name == "rabitq":
        return _make_rabitq(**arguments)
    if name not in SELECTORS:
        raise ValueError(f"selector must be one of {', '.join(['rabitq', *SELECTORS])}, got {name!r}")
    return SELECTORS[name].from_arguments(**arguments)


def _make_rabitq(**arguments) -> RaBitQConfig:
    try:
        return RaBitQConfig(**arguments)
    except TypeError as error:
        raise ValueError(f"RaBitQConfig: {error}") from None


__all__ = [
    "SELECTORS",
    "Attended",
    "CacheShape",
    "Choice",
    "FullAttention",
    "OracleTopK",
    "OracleTopP",
    "Quest",
    "Rule",
    "ScoringSelector",
    "Selector",
    "Step",
    "StreamingLLM",
    "TopK",
    "TopKThenTopP",
    "TopP",
    "make_selector",
]
