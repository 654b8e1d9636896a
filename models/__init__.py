"""Llama decoders in Flax NNX, and their checkpoints in Hugging Face format."""

from pathlib import Path

from models.checkpoint import save_pretrained
from models.config import LlamaConfig, RopeConfig
from models.llama import Llama, causal_attention
from models.pretrained import load_pretrained
from models.tokenizer import TextStream, Tokenizer

# A small model trained for long-context retrieval, which comes with the package: see the README in its folder.
RETRIEVER = Path(__file__).parent / "retriever"

__all__ = [
    "RETRIEVER",
    "Llama",
    "LlamaConfig",
    "RopeConfig",
    "TextStream",
    "Tokenizer",
    "causal_attention",
    "load_pretrained",
    "save_pretrained",
]
