"""Llama decoders in Flax NNX, and their checkpoints in Hugging Face format."""

from models.config import LlamaConfig, RopeConfig
from models.llama import Llama, causal_attention

__all__ = ["Llama", "LlamaConfig", "RopeConfig", "causal_attention"]
