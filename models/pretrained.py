"""load_pretrained: a model and its tokenizer from a folder or from the Hugging Face hub."""

import re
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
from huggingface_hub.errors import RepositoryNotFoundError

from models.checkpoint import load_model
from models.folder import read_config
from models.llama import Llama
from models.tokenizer import Tokenizer

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
# The same weights once more, in Meta's or Mistral's own format.
HUB_FILES_LEFT_OUT = ["original/*", "consolidated*"]


def load_pretrained(
    path_or_hub_id: str | Path, *, dtype=jnp.bfloat16, revision: str | None = None, progress: bool = True
) -> tuple[Llama, Tokenizer]:
    """Load a Llama checkpoint in Hugging Face format.

    Args:
      path_or_hub_id: a folder with config.json, safetensors weights and tokenizer.json; or, where no such folder
        exists, a repository of the Hugging Face hub ("owner/name"), which is downloaded into the hub's cache.
      dtype: of parameters and activations: bfloat16, float16 or float32.
      revision: branch, tag or commit of the repository.
      progress: show a progress bar on standard error while the weights are read.

    Returns:
      The model, with the EOS tokens of config.json and generation_config.json in `model.config.eos_token_ids`, and the
      tokenizer.

    Raises:
      ValueError: there is no such folder or repository, or a file in it is missing, malformed or not supported; the
        message names it.
    """
    folder = find_folder(path_or_hub_id, revision)
    config = read_config(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return load_model(folder, config, dtype=dtype, progress=progress), tokenizer


def find_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; a repository of the hub is downloaded. Arguments, errors: see `load_pretrained`."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path_or_hub_id} is a file; a checkpoint is a folder")
    if isinstance(path_or_hub_id, Path) or not HUB_ID.fullmatch(path_or_hub_id):
        raise ValueError(f"folder {str(path_or_hub_id)!r} does not exist (and a hub id would be like 'owner/name')")
    try:
        snapshot = huggingface_hub.snapshot_download(
            path_or_hub_id, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_LEFT_OUT
        )
    except RepositoryNotFoundError as error:
        raise ValueError(f"{path_or_hub_id!r} is neither a folder nor a repository of the hub: {error}") from error
    return Path(snapshot)
