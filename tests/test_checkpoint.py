"""Checkpoint folders: what is read, what is written, what is refused, and the memory that loading takes."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.numpy import load_file, save_file

from models import Llama, load_pretrained, save_pretrained
from tests.checkpoints import TINY, load, random_weights, write_json, write_model, write_sharded, write_tokenizer

BIASED = TINY | {"attention_bias": True, "mlp_bias": True}
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def weights_of(model: Llama) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same_weights(one: Llama, other: Llama) -> None:
    jax.tree.map(np.testing.assert_array_equal, weights_of(one), weights_of(other))


def test_every_tensor_arrives_transposed_where_it_is_a_matrix(tmp_path):
    weights = random_weights(BIASED)
    got = weights_of(load(write_model(tmp_path, BIASED, weights)))
    assert len(weights) == 2 * 16 + 3 and len(got) == len(weights) - 2 * 6
    np.testing.assert_array_equal(got["embed_tokens.weight"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(got["lm_head.weight"], weights["lm_head.weight"].T)
    np.testing.assert_array_equal(got["layers.0.mlp.down_proj.bias"], weights["model.layers.0.mlp.down_proj.bias"])
    for fused, names in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
        block, _, _ = fused.partition(".")
        for kind in ("weight", "bias"):
            parts = [weights[f"model.layers.1.{block}.{name}_proj.{kind}"].T for name in names]
            np.testing.assert_array_equal(got[f"layers.1.{fused}.{kind}"], np.concatenate(parts, axis=-1))


def test_shards_are_joined_by_their_index(tmp_path):
    weights = random_weights(TINY)
    single = load(write_model(tmp_path / "single", TINY, weights))
    assert_same_weights(single, load(write_sharded(tmp_path / "sharded", TINY, weights)))


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_converts_dtypes(stored, wanted, tmp_path):
    weights = {name: tensor.astype(stored) for name, tensor in random_weights(TINY).items()}
    model = load(write_model(tmp_path, TINY, weights), dtype=wanted)
    assert model.dtype == wanted
    query = weights[Q_PROJ].T.astype(wanted)
    np.testing.assert_array_equal(weights_of(model)["layers.1.self_attn.qkv_proj.weight"][:, : query.shape[1]], query)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_saved_model_loads_as_the_same(dtype, tmp_path):
    model = load(write_model(tmp_path / "first", BIASED | {"eos_token_id": [3, 7]}), dtype)
    save_pretrained(model, tmp_path / "second")
    again = load(tmp_path / "second", dtype)
    assert again.config == model.config
    assert_same_weights(again, model)
    assert json.loads((tmp_path / "second/config.json").read_text())["torch_dtype"] == model.dtype.name
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys()
    np.testing.assert_array_equal(second[Q_PROJ], first[Q_PROJ].astype(dtype))


def test_tied_model_saves_no_head(tmp_path):
    save_pretrained(load(write_model(tmp_path / "first", TINY | {"tie_word_embeddings": True})), tmp_path / "second")
    assert "lm_head.weight" not in load_file(tmp_path / "second/model.safetensors")


def test_redundant_tensors_are_ignored(tmp_path):
    tied = TINY | {"tie_word_embeddings": True}
    redundant = {
        "lm_head.weight": np.zeros((128, 64), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
    }
    plain = load(write_model(tmp_path / "plain", tied, random_weights(tied)))
    assert_same_weights(plain, load(write_model(tmp_path / "more", tied, random_weights(tied) | redundant)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q_PROJ: None}, rf"they lack {Q_PROJ}$"),
        ({name: None for name in random_weights(TINY) if "layers.1" in name}, "lack .* and 4 more"),
        ({"lm_head.weight": None}, "lack lm_head.weight"),
        ({"model.layers.2.mlp.up_proj.weight": np.zeros(1)}, "also hold model.layers.2.mlp.up_proj.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": np.zeros(64)}, "also hold model.layers.0.self_attn.q_proj.bias"),
        ({Q_PROJ: None, "q.weight": np.zeros(1)}, f"lack {Q_PROJ} and also hold q.weight"),
        ({Q_PROJ: np.zeros((64, 32), np.float32)}, rf"{Q_PROJ} in .* has shape \(64, 32\), .* must be \(64, 64\)"),
        ({Q_PROJ: np.zeros(64 * 64, np.float32)}, rf"{Q_PROJ} in .* has shape \(4096,\)"),
        ({Q_PROJ: np.zeros((64, 64), np.int8)}, f"{Q_PROJ} in .* has dtype I8"),
        ({Q_PROJ: np.zeros((64, 64), np.float64)}, f"{Q_PROJ} in .* has dtype F64"),
    ],
)
def test_refuses_tensors_that_do_not_fit(changes, message, tmp_path):
    weights = {name: tensor for name, tensor in (random_weights(TINY) | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load(write_model(tmp_path, TINY, weights))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100],
        lambda content: content[:1000],
        lambda content: content[:4],
        lambda content: b"",
        lambda content: content + b"more",
        lambda content: content[:8] + b"?" + content[9:],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["cut data", "cut header", "cut length", "empty", "trailing", "no json", "huge header", "git-lfs pointer"],
)
def test_refuses_damaged_safetensors(damage, tmp_path):
    file = write_model(tmp_path, TINY) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "a\\b"])
def test_refuses_an_index_that_names_files_outside_the_folder(name, tmp_path):
    save_file(random_weights(TINY), tmp_path / "other.safetensors")
    folder = write_sharded(tmp_path / "model", TINY, random_weights(TINY))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q_PROJ] = name
    write_json(folder / INDEX, index)
    with pytest.raises(ValueError, match="not a file directly in its folder: refused"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {Q_PROJ: "model-00009-of-00009.safetensors"}}, "00009.safetensors', which does not exist"),
        ({"weight_map": {"lost": "model-00001-of-00003.safetensors"}}, "tensor lost is in .* which does not hold it"),
        ({"weight_map": {}}, "they lack lm_head.weight"),
        ({"weight_map": {Q_PROJ: 3}}, "must hold 'weight_map'"),
        ({"metadata": {}}, "must hold 'weight_map'"),
        ([1], "index.json must hold a JSON object, got list"),
    ],
)
def test_refuses_an_index_that_is_wrong(index, message, tmp_path):
    write_sharded(tmp_path, TINY, random_weights(TINY))
    write_json(tmp_path / INDEX, index)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_refuses_a_folder_without_weights_or_config(tmp_path):
    write_json(tmp_path / "config.json", TINY)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="no weights in safetensors format"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        load(tmp_path)


@pytest.mark.parametrize("content", ['{"vocab_size": 12', "", "\x00"])
def test_refuses_malformed_json(content, tmp_path):
    (write_model(tmp_path, TINY) / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load(tmp_path)


def test_refuses_a_dtype_that_is_not_a_models(tmp_path):
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32, got int8"):
        load(write_model(tmp_path, TINY), jnp.int8)


def write_whole(folder: Path) -> Path:
    write_model(folder, TINY | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257})
    write_json(folder / "generation_config.json", {"eos_token_id": [257, 10]})
    return write_tokenizer(folder)


def test_load_pretrained_reads_model_and_tokenizer(tmp_path, capsys):
    model, tokenizer = load_pretrained(write_whole(tmp_path), dtype=jnp.float32)
    assert model.config.eos_token_ids == tokenizer.eos_token_ids == (257, 10)
    assert model.config.bos_token_id == tokenizer.bos_token_id == 256
    assert "Loading: 100%" in capsys.readouterr().err
    load_pretrained(str(tmp_path), progress=False)
    assert capsys.readouterr().err == ""


def test_load_pretrained_downloads_what_is_not_a_folder(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(write_whole(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = load_pretrained("owner/some-Llama_3.2", revision="v1", progress=False)
    assert model.dtype == jnp.bfloat16
    ((repo_id, options),) = calls
    assert (repo_id, options["revision"]) == ("owner/some-Llama_3.2", "v1")
    assert {"*.json", "*.safetensors", "*.jinja"} == set(options["allow_patterns"])


def test_load_pretrained_names_a_repository_that_does_not_exist(monkeypatch):
    def snapshot_download(repo_id, **_):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="'no/such' is neither a folder nor a repository"):
        load_pretrained("no/such")


@pytest.mark.parametrize("path", ["./no/such", "/no/such", "~/no/such", "no/such/folder", "no-such", Path("no/such")])
def test_load_pretrained_refuses_a_path_that_does_not_exist(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="does not exist"):
        load_pretrained(path)


def test_load_pretrained_refuses_a_file(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match="model.gguf is a file"):
        load_pretrained(tmp_path / "model.gguf")


PEAK_MEMORY = """
import re, sys
from pathlib import Path
from tests.checkpoints import load

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

load(Path(sys.argv[1]))  # what JAX needs for itself, compiled functions included
before = peak()
model = load(Path(sys.argv[2]))
print(peak() - before)
"""


def test_loading_takes_the_models_memory_and_little_more(tmp_path):
    """The peak resident memory of a process of its own, which loads a model of 75 MB whose largest tensor has 4 MB."""
    shape = TINY | {"hidden_size": 512, "intermediate_size": 2048}
    small, large = (write_model(tmp_path / str(n), shape | {"num_hidden_layers": n}) for n in (1, 5))
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(small), str(large)], capture_output=True, text=True, check=True
    )
    model_size = (large / "model.safetensors").stat().st_size
    # The memory of the first may be used again, so that the second seems to take less.
    small_size = (small / "model.safetensors").stat().st_size
    assert model_size - 2 * small_size < int(done.stdout) < 1.3 * model_size
