"""A tokenizer of bytes in Hugging Face format, for models that are made here."""

import functools
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


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


@functools.cache
def ascii_ids() -> tuple[int, np.ndarray]:
    """The token that begins a text, and the token of each ASCII character, int32 [128]."""
    begin, *ids = byte_tokenizer().encode("".join(map(chr, range(128)))).ids
    return begin, np.array(ids, np.int32)


def save_byte_tokenizer(folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
    folder, tokenizer = Path(folder), byte_tokenizer()
    special = {"bos_token_id": tokenizer.token_to_id(BEGIN), "eos_token_id": tokenizer.token_to_id(END)}
    _write_json(folder / "generation_config.json", {"do_sample": False, **special})
    _write_json(folder / "tokenizer_config.json", {"bos_token": BEGIN, "eos_token": END})
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
