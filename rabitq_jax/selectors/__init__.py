"""Retrieval methods over one cache: each says which cached tokens a decode step attends, and what finding them reads.

    generate(model, prompt, Quest(rule=TopK(budget=1024)), max_new_tokens=64, key=key)
    generate(model, prompt, make_selector("quest", page=16, budget=1024), ...)

RaBitQ, the default method, is `RaBitQConfig`: it has kernels of its own, and stands in the same table.
"""

from rabitq_jax.config import RaBitQConfig
from rabitq_jax.selectors.budget import Rule, TopK, TopKThenTopP, TopP
from rabitq_jax.selectors.double_sparsity import DoubleSparsity
from rabitq_jax.selectors.duo_attention import DuoAttention
from rabitq_jax.selectors.extended_rabitq import ExtendedRaBitQ
from rabitq_jax.selectors.full import FullAttention
from rabitq_jax.selectors.h2o import H2O
from rabitq_jax.selectors.kivi import KIVI
from rabitq_jax.selectors.magicpig import MagicPIG
from rabitq_jax.selectors.oracle import OracleTopK, OracleTopP
from rabitq_jax.selectors.pqcache import PQCache
from rabitq_jax.selectors.pyramidkv import PyramidKV
from rabitq_jax.selectors.quest import Quest
from rabitq_jax.selectors.selector import (
    Attended,
    CacheShape,
    Choice,
    ScoringSelector,
    Selector,
    Step,
    check_names,
)
from rabitq_jax.selectors.snapkv import SnapKV
from rabitq_jax.selectors.sparq import SparQ
from rabitq_jax.selectors.streaming_llm import StreamingLLM
from rabitq_jax.selectors.tidal_decode import TidalDecode
from rabitq_jax.selectors.twilight import Twilight

SELECTORS: dict[str, type[Selector]] = {
    "full": FullAttention,
    "oracle-top-k": OracleTopK,
    "oracle-top-p": OracleTopP,
    "streaming-llm": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "quest": Quest,
    "sparq": SparQ,
    "double-sparsity": DoubleSparsity,
    "tidal-decode": TidalDecode,
    "twilight": Twilight,
    "magicpig": MagicPIG,
    "pqcache": PQCache,
    "duo-attention": DuoAttention,
    "kivi": KIVI,
    "extended-rabitq": ExtendedRaBitQ,
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
    check_names(RaBitQConfig, arguments)
    return RaBitQConfig(**arguments)


__all__ = [
    "SELECTORS",
    "Attended",
    "CacheShape",
    "Choice",
    "DoubleSparsity",
    "DuoAttention",
    "ExtendedRaBitQ",
    "FullAttention",
    "H2O",
    "KIVI",
    "MagicPIG",
    "OracleTopK",
    "OracleTopP",
    "PQCache",
    "PyramidKV",
    "Quest",
    "Rule",
    "ScoringSelector",
    "Selector",
    "SnapKV",
    "SparQ",
    "Step",
    "StreamingLLM",
    "TidalDecode",
    "TopK",
    "TopKThenTopP",
    "TopP",
    "Twilight",
    "make_selector",
]
