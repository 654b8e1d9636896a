"""Tiny checkpoint folders in Hugging Face format, with weights drawn by NumPy so that a seed is enough to know them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from benchmarks.byte_tokenizer import BEGIN, END, byte_tokenizer
from models.checkpoint import load_model
from models.folder import read_config
from models.llama import Llama

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a model, float32, in the order of the layers; attention is peaked, biases and norms matter."""
    rng = np.random.default_rng(seed)
    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    query_size, kv_size = heads * head_dim, config["num_key_value_heads"] * head_dim

    def normal(*shape: int, std: float) -> np.ndarray:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int, *, bias: bool, gain: float = 1.0) -> dict[str, np.ndarray]:
        weight = {f"{name}.weight": normal(outputs, inputs, std=gain / inputs**0.5)}
        return weight | ({f"{name}.bias": normal(outputs, std=0.3)} if bias else {})

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": 1 + normal(hidden, std=0.1)}

    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, std=0.3)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        bias = config.get("attention_bias", False)
        weights |= norm(f"{layer}.input_layernorm")
        weights |= linear(f"{layer}.self_attn.q_proj", query_size, hidden, bias=bias, gain=1.5)
        weights |= linear(f"{layer}.self_attn.k_proj", kv_size, hidden, bias=bias, gain=1.5)
        weights |= linear(f"{layer}.self_attn.v_proj", kv_size, hidden, bias=bias)
        weights |= linear(f"{layer}.self_attn.o_proj", hidden, query_size, bias=bias)
        weights |= norm(f"{layer}.post_attention_layernorm")
        bias = config.get("mlp_bias", False)
        weights |= linear(f"{layer}.mlp.gate_proj", mlp, hidden, bias=bias)
        weights |= linear(f"{layer}.mlp.up_proj", mlp, hidden, bias=bias)
        weights |= linear(f"{layer}.mlp.down_proj", hidden, mlp, bias=bias)
    weights |= norm("model.norm")
    if not config["tie_word_embeddings"]:
        weights |= linear("lm_head", config["vocab_size"], hidden, bias=False, gain=2.5)
    return weights


def write_model(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> Path:
    """Write config.json and model.safetensors; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_file(weights or random_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sharded(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], shards: int = 3) -> Path:
    """Write config.json, several safetensors files and their index; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = list(weights)[shard::shards]
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_tokenizer(folder: Path, **config: Any) -> Path:
    """Write the demo's byte tokenizer and a tokenizer_config.json with these entries added; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": {"__type": "AddedToken", "content": END, "lstrip": False, "rstrip": False, "normalized": False},
    }
    write_json(folder / "tokenizer_config.json", content | config)
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, dtype=jnp.float32) -> Llama:
    """The model alone, of a folder that may have no tokenizer."""
    return load_model(folder, read_config(folder), dtype=dtype, progress=False)
