"""Llama decoders in Flax NNX, and their checkpoints in Hugging Face format."""

from models.checkpoint import save_pretrained
from models.config import LlamaConfig, RopeConfig
from models.llama import Llama, causal_attention
from models.pretrained import load_pretrained
from models.tokenizer import TextStream, Tokenizer

__all__ = [
    "Llama",
    "LlamaConfig",
    "RopeConfig",
    "TextStream",
    "Tokenizer",
    "causal_attention",
    "load_pretrained",
    "save_pretrained",
]
