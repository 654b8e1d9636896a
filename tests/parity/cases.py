"""Models and chats whose outputs by Hugging Face transformers are kept in references/, written by make_references.py.

A model's weights follow from its case's seed; the prompt too. Only outputs are stored.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import TINY, random_weights, write_model

REFERENCES = Path(__file__).parent / "references"
NEW_TOKENS = 64
# Greedy tokens are compared one by one, so the best logit must lead by far more than rounding.
MIN_MARGIN = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model, by its changes to the tiny config.json, and a prompt."""

    name: str
    changes: dict[str, Any]
    prompt_length: int = 24
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        return {key: value for key, value in (TINY | self.changes).items() if value != "absent"}

    @property
    def prompt(self) -> np.ndarray:
        """int32 [prompt_length]."""
        rng = np.random.default_rng(self.seed + 1000)
        return rng.integers(0, self.config["vocab_size"], self.prompt_length, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What transformers gives: logits float32 [prompt_length,vocab] and greedy tokens int32 [NEW_TOKENS]."""

    prompt: np.ndarray
    logits: np.ndarray
    greedy_tokens: np.ndarray


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES = [
    Case("mha", {"num_key_value_heads": 4}),
    Case("gqa", {"num_hidden_layers": 3}),
    Case("mqa", {"num_key_value_heads": 1}),
    Case("tied", {"tie_word_embeddings": True}, seed=6),
    Case("biases", {"attention_bias": True, "mlp_bias": True}),
    Case("head_dim_20", {"head_dim": 20}),
    Case("head_dim_34", {"head_dim": 34, "num_attention_heads": 2}),
    Case("default_rope_new_style", {"rope_theta": "absent", "rope_parameters": {"rope_theta": 500.0}}),
    Case("linear_rope", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    Case(
        "dynamic_rope_crossing",
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 48},
    ),
    Case(
        "dynamic_rope_long_prompt",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
        prompt_length=40,
    ),
    Case("llama3_rope", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}, seed=1),
    Case("llama3_rope_new_style", {"rope_theta": "absent", "rope_parameters": LLAMA3_ROPE | {"rope_theta": 2000.0}}),
]


def make_folder(case: Case, path: Path) -> Path:
    """Write config.json and float32 weights of a case; return the folder. It has no tokenizer."""
    return write_model(path, case.config, random_weights(case.config, case.seed))


def reference(case: Case) -> Reference:
    """The stored reference of a case."""
    with np.load(REFERENCES / f"{case.name}.npz") as stored:
        return Reference(case.prompt, stored["logits"], stored["greedy_tokens"])


def chat_references() -> dict[str, dict[str, dict[str, Any]]]:
    """Template name -> conversation name -> "text" and "token_ids"; see chats.py."""
    return json.loads((REFERENCES / "chats.json").read_text(encoding="utf-8"))
