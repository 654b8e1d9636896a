"""The JSON files of a checkpoint folder in Hugging Face format."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from models.config import LlamaConfig, eos_token_ids


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: there is no such file, or it does not hold a JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; a file that does not exist reads as an empty object."""
    return read_json(path) if path.exists() else {}


def read_config(folder: Path) -> LlamaConfig:
    """The model's configuration by config.json, with the EOS tokens of generation_config.json added.

    Raises:
      ValueError: config.json does not exist or is malformed, or names something that is not supported.
    """
    config = LlamaConfig.from_hf(read_json(folder / "config.json"))
    return dataclasses.replace(config, eos_token_ids=read_eos_token_ids(folder))


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Every token that ends a text, by generation_config.json and config.json; each file may be absent."""
    files = [read_json_if_there(folder / name) for name in ("generation_config.json", "config.json")]
    return tuple(dict.fromkeys(token for content in files for token in eos_token_ids(content)))
