"""A small Llama checkpoint in Hugging Face format, with random weights whose attention is peaked.

Plain random projections give logits of about unit spread, hence attention that is nearly flat over a long context, and
Top-p would have to keep most of it. Trained heads are peaked. So the query and key projections are made larger: with an
input of unit mean square, their outputs have standard deviation `sharpness`, and the logits q.k / sqrt(head_dim) about
`sharpness` squared.

    python demo/make_checkpoint.py demo/out/checkpoint
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def make_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    sharpness: float = 2.0,
    hidden: int = 256,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    mlp: int = 512,
    max_position: int = 131072,
) -> Path:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files; return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    vocabulary = tokenizer.get_vocab_size()
    special = {"bos_token_id": tokenizer.token_to_id(BEGIN), "eos_token_id": tokenizer.token_to_id(END)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": max_position,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **special,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"do_sample": False, **special})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "model_max_length": max_position,
            "clean_up_tokenization_spaces": False,
        },
    )

    rng = np.random.default_rng(seed)

    def projection(outputs: int, inputs: int, spread: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((outputs, inputs)) * spread / np.sqrt(inputs)).astype(np.float32)

    weights = {"model.embed_tokens.weight": rng.standard_normal((vocabulary, hidden)).astype(np.float32)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "self_attn.q_proj.weight": projection(heads * head_dim, hidden, sharpness),
            prefix + "self_attn.k_proj.weight": projection(kv_heads * head_dim, hidden, sharpness),
            prefix + "self_attn.v_proj.weight": projection(kv_heads * head_dim, hidden),
            prefix + "self_attn.o_proj.weight": projection(hidden, heads * head_dim),
            prefix + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "mlp.gate_proj.weight": projection(mlp, hidden),
            prefix + "mlp.up_proj.weight": projection(mlp, hidden),
            prefix + "mlp.down_proj.weight": projection(hidden, mlp),
        }
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    weights["lm_head.weight"] = projection(vocabulary, hidden, 4.0)
    # A row of zeros is never the largest of many logits, so that greedy text is printable and does not end early.
    weights["lm_head.weight"][_unprintable_ids(tokenizer)] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: a token is a byte of UTF-8, and a text begins with `BEGIN`, as in Llama 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: token for token, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def _unprintable_ids(tokenizer: Tokenizer) -> list[int]:
    printable = {tokenizer.encode(chr(code), add_special_tokens=False).ids[0] for code in range(32, 127)}
    return sorted(set(range(tokenizer.get_vocab_size())) - printable)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_checkpoint(arguments.folder, seed=arguments.seed))
