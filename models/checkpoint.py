"""Weights of a Llama model from and to safetensors files with Hugging Face's tensor names."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from models.config import LlamaConfig
from models.folder import read_json
from models.llama import Llama

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BYTES_PER_VALUE = {"BF16": 2, "F16": 2, "F32": 4}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it (dtype in safetensors' spelling)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * BYTES_PER_VALUE[self.dtype]


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns of a parameter that are stored as one tensor: all of them, but for projections that are one matrix here.

    Attributes:
      path: of the parameter.
      module: the tensor's own module, the last but one of its name.
      shape: of these columns.
      first: the first one's number.
    """

    path: tuple[Any, ...]
    module: str
    shape: tuple[int, ...]
    first: int

    @property
    def tensor_name(self) -> str:
        name = ".".join(map(str, (*self.path[:-2], self.module, self.path[-1])))
        return name if self.path[0] == "lm_head" else f"model.{name}"

    @property
    def transposed(self) -> bool:
        return len(self.shape) == 2 and self.path[0] != "embed_tokens"

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


def parts_of(path: tuple[Any, ...], shape: tuple[int, ...], config: LlamaConfig) -> list[Part]:
    """The tensors that a parameter is stored as, in the order of its columns."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widths = {
        "qkv_proj": {"q_proj": query, "k_proj": key, "v_proj": key},
        "gate_up_proj": {"gate_proj": config.mlp_size, "up_proj": config.mlp_size},
    }.get(path[-2], {path[-2]: shape[-1]})
    starts = np.cumsum([0, *widths.values()]).tolist()
    return [
        Part(path, module, (*shape[:-1], width), first)
        for (module, width), first in zip(widths.items(), starts, strict=False)
    ]


def load_model(folder: str | Path, config: LlamaConfig, *, dtype=jnp.bfloat16, progress: bool = True) -> Llama:
    """Build a model from model.safetensors, or from the shards that model.safetensors.index.json names.

    All tensors' names, shapes and dtypes are checked before the first is read. They are then read one at a time, and
    transposed and converted on the device: beyond the model, memory holds one tensor.

    Args:
      dtype: of the model: bfloat16, float16 or float32; the files may hold any of these.
      progress: show a progress bar on standard error.

    Raises:
      ValueError: there are no weights, a file is missing, truncated or corrupt, the index names a file outside the
        folder, or tensors are missing, unknown, or of the wrong shape or dtype; the message names it.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    model = Llama.abstract(config, dtype=dtype)
    state = nnx.state(model)
    variables = dict(nnx.to_flat_state(state))
    parts = [part for path, variable in variables.items() for part in parts_of(path, variable.shape, config)]
    stored = _stored_tensors(Path(folder))
    _check_tensors(stored, parts, config, Path(folder))
    parts.sort(key=lambda part: (stored[part.tensor_name].file, part.tensor_name))
    total = sum(stored[part.tensor_name].nbytes for part in parts)
    arrays: dict[tuple[Any, ...], jax.Array] = {}
    with tqdm(total=total, desc="Loading", unit="B", unit_scale=True, disable=not progress) as bar:
        for part in parts:
            tensor, shape = stored[part.tensor_name], variables[part.path].shape
            if part.shape == shape:
                arrays[part.path] = _load(tensor, transpose=part.transposed, dtype=dtype)
            else:
                whole = arrays[part.path] if part.path in arrays else jnp.empty(shape, dtype)
                arrays[part.path] = _load_into(whole, tensor, part)
            bar.update(tensor.nbytes)
    for path, array in arrays.items():
        variables[path].set_value(array)
    nnx.update(model, state)
    return model


def save_pretrained(model: Llama, folder: str | Path) -> None:
    """Write config.json and model.safetensors, to be read by `load_pretrained` or by transformers.

    The host's memory holds a copy of the model meanwhile.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = np.asarray(variable.get_value())
        for part in parts_of(path, variable.shape, model.config):
            columns = array[..., part.first : part.first + part.shape[-1]]
            # safetensors writes the buffer as it lies in memory, whatever the strides.
            tensors[part.tensor_name] = np.ascontiguousarray(columns.T if part.transposed else columns)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    content = model.config.to_hf() | {"torch_dtype": model.dtype.name}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    if (folder / WEIGHTS).is_file():
        return _read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has no weights in safetensors format: neither {WEIGHTS} nor {INDEX}")
    file_of = _read_weight_map(folder)
    headers = {file: _read_header(folder / file) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in headers[file]:
            raise ValueError(f"{folder / INDEX} says that tensor {name} is in {file}, which does not hold it")
    return {name: headers[file][name] for name, file in file_of.items()}


def _read_weight_map(folder: Path) -> dict[str, str]:
    """The index: tensor name -> name of a file that lies directly in the folder."""
    file_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise ValueError(f"{folder / INDEX} must hold 'weight_map', an object of tensor names and file names")
    for file in sorted(set(file_of.values())):
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise ValueError(f"{folder / INDEX} names {file!r}, which is not a file directly in its folder: refused")
        if not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX} names {file!r}, which does not exist")
    return file_of


def _read_header(file: Path) -> dict[str, StoredTensor]:
    with _open(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {
            name: StoredTensor(name, file, header.get_dtype(), tuple(header.get_shape()))
            for name, header in slices.items()
        }


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def _check_tensors(stored: dict[str, StoredTensor], parts: list[Part], config: LlamaConfig, folder: Path) -> None:
    expected = {part.tensor_name for part in parts}
    missing = sorted(expected - set(stored))
    unknown = sorted(name for name in set(stored) - expected if not _is_redundant(name, config))
    if missing or unknown:
        problems = [f"{kind} {_listing(names)}" for kind, names in (("lack", missing), ("also hold", unknown)) if names]
        raise ValueError(f"the weights in {folder} do not fit config.json: they {' and '.join(problems)}")
    for part in parts:
        tensor = stored[part.tensor_name]
        if tensor.shape != part.tensor_shape:
            raise ValueError(
                f"tensor {tensor.name} in {tensor.file} has shape {tensor.shape}, by config.json it must be "
                f"{part.tensor_shape}"
            )
        if tensor.dtype not in BYTES_PER_VALUE:
            raise ValueError(
                f"tensor {tensor.name} in {tensor.file} has dtype {tensor.dtype}, it must be one of "
                f"{sorted(BYTES_PER_VALUE)}"
            )


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Whether a stored tensor repeats what the configuration or another tensor says."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings)


def _listing(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _load(tensor: StoredTensor, *, transpose: bool, dtype) -> jax.Array:
    return jax.block_until_ready(_convert(_read(tensor), transpose=transpose, dtype=dtype))


def _load_into(whole: jax.Array, tensor: StoredTensor, part: Part) -> jax.Array:
    return jax.block_until_ready(_place(whole, _read(tensor), part.first, transpose=part.transposed))


def _read(tensor: StoredTensor) -> jax.Array:
    # The file is opened anew for each tensor: pages of it that were read stay in memory while it is open.
    with _open(tensor.file) as tensors:
        return jax.device_put(tensors.get_tensor(tensor.name))


@functools.partial(jax.jit, static_argnames=("transpose", "dtype"))
def _convert(array: jax.Array, *, transpose: bool, dtype) -> jax.Array:
    return (array.T if transpose else array).astype(dtype)


@functools.partial(jax.jit, static_argnames=("transpose",), donate_argnames=("whole",))
def _place(whole: jax.Array, array: jax.Array, first, *, transpose: bool) -> jax.Array:
    columns = (array.T if transpose else array).astype(whole.dtype)
    return jax.lax.dynamic_update_slice_in_dim(whole, columns, first, axis=whole.ndim - 1)
