import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabitq_jax import RaBitQConfig, init_cache
from rabitq_jax.cache import append, init_layer_cache, round_capacity

SIZES = dict(batch=2, capacity=512, num_kv_heads=2, head_dim=20)
MODEL = SimpleNamespace(num_layers=4, num_heads=4, num_kv_heads=2, head_dim=20)


@pytest.mark.parametrize(
    "tokens,interval,capacity",
    [(1, 128, 512), (512, 128, 512), (513, 128, 1024), (1, 96, 1536), (1537, 96, 3072), (1, 1024, 1024)],
)
def test_capacity_is_whole_blocks(tokens, interval, capacity):
    assert round_capacity(tokens, RaBitQConfig(interval=interval)) == capacity


def test_capacity_of_a_dense_cache():
    assert round_capacity(700, None) == 1024


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        init_layer_cache(**(SIZES | {name: value}), config=RaBitQConfig())


@pytest.mark.parametrize("capacity,interval,unit", [(500, 128, 512), (1024, 96, 1536)])
def test_capacity_must_be_whole_blocks(capacity, interval, unit):
    with pytest.raises(ValueError, match=f"multiple of {unit} tokens, got {capacity}"):
        init_layer_cache(**(SIZES | {"capacity": capacity}), config=RaBitQConfig(interval=interval))


@pytest.mark.parametrize("rotation", ["haar", "hadamard"])
@pytest.mark.parametrize("head_dim,words", [(20, 1), (48, 2), (80, 4)])
def test_arrays_of_a_layer(rotation, head_dim, words):
    config = RaBitQConfig(interval=64, rotation=rotation, query_centroid="prompt")
    cache = init_layer_cache(**(SIZES | {"head_dim": head_dim}), config=config)
    shapes = {path: (leaf.shape, leaf.dtype.name) for path, leaf in vars(cache.codes).items()}
    assert shapes == {
        "bits": ((2, 2, 512, words), "uint32"),
        "scale": ((2, 2, 512), "bfloat16"),
        "bias": ((2, 2, 512), "bfloat16"),
        "key_centroids": ((2, 2, 8, head_dim), "bfloat16"),
        "query_centroid": ((2, 2, head_dim), "float32"),
        "rotation": ((32 * words, head_dim), "float32"),
    }
    assert cache.keys.shape == cache.values.shape == (2, 2, 512, head_dim) and cache.keys.dtype == jnp.bfloat16
    assert cache.capacity == 512 and cache.length.tolist() == cache.quantized.tolist() == [0, 0]


def test_prompt_centroid_is_one_and_query_centroid_is_optional():
    codes = init_layer_cache(**SIZES, config=RaBitQConfig(key_centroid="prompt")).codes
    assert codes is not None
    assert codes.key_centroids.shape == (2, 2, 1, 20) and codes.tokens_per_centroid == 512
    assert codes.bias is None and codes.query_centroid is None


def test_model_cache():
    cache = init_cache(MODEL, 2, 512, RaBitQConfig(dense_layers=1, rotation_seed=7), dtype=jnp.float32)
    coded = [layer.codes for layer in cache.layers]
    assert [codes is None for codes in coded] == [True, False, False, False]
    rotations = [np.asarray(codes.rotation) for codes in coded[1:] if codes is not None]
    assert not np.allclose(rotations[0], rotations[1])
    assert int(cache.rotation_seed) == 7 and cache.capacity == 512
    assert cache.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    assert all(layer.codes is None for layer in init_cache(MODEL, 2, 512, None).layers)


def test_rotations_depend_on_the_seed_and_the_layer_alone():
    def rotation(seed, batch):
        codes = init_cache(MODEL, batch, 512, RaBitQConfig(rotation_seed=seed)).layers[-1].codes
        assert codes is not None
        return np.asarray(codes.rotation)

    np.testing.assert_array_equal(rotation(1, 1), rotation(1, 3))
    assert not np.allclose(rotation(1, 1), rotation(2, 1))


def test_append_is_ragged_and_writes_nothing_else():
    """Against a loop over tokens; the last sequence has no room for all of them, and another gets none."""
    rng = np.random.default_rng(0)
    empty = init_layer_cache(**(SIZES | {"batch": 4}), config=None, dtype=jnp.float32)
    start, new = np.array([0, 3, 100, 510]), np.array([5, 0, 3, 5])
    held = rng.normal(size=(2, *empty.keys.shape)).astype(np.float32)
    cache = dataclasses.replace(
        empty, keys=jnp.asarray(held[0]), values=jnp.asarray(held[1]), length=jnp.asarray(start, jnp.int32)
    )
    chunk = rng.normal(size=(2, 4, 5, 2, 20)).astype(np.float32)
    got = append(cache, jnp.asarray(chunk[0]), jnp.asarray(chunk[1]), jnp.asarray(new, jnp.int32))
    for b in range(4):
        for i in range(new[b]):
            if start[b] + i < 512:
                held[:, b, :, start[b] + i] = chunk[:, b, i]
    np.testing.assert_array_equal(got.keys, held[0])
    np.testing.assert_array_equal(got.values, held[1])
    assert got.length.tolist() == (start + new).tolist()


@pytest.mark.kernel
@pytest.mark.parametrize("head_dim", [20, 64])
def test_append_kernel_matches_definition(head_dim):
    """One token each: for an empty cache, a held one, one that gets none, one that is full."""
    empty = init_layer_cache(**(SIZES | {"batch": 4, "head_dim": head_dim}), config=None)
    held = jax.random.normal(jax.random.key(0), (2, *empty.keys.shape), jnp.bfloat16)
    cache = dataclasses.replace(empty, keys=held[0], values=held[1], length=jnp.array([0, 100, 7, 512]))
    token = jax.random.normal(jax.random.key(1), (2, 4, 1, 2, head_dim))
    new = jnp.array([1, 1, 0, 1])
    want, got = (
        jax.jit(append, static_argnames="implementation")(cache, *token, new, implementation=name)
        for name in ("xla", "pallas")
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.any(np.asarray(got.keys != cache.keys))


def test_append_kernel_takes_one_token():
    cache = init_layer_cache(**SIZES, config=None)
    chunk = jnp.zeros((2, 3, 2, 20))
    with pytest.raises(NotImplementedError, match="appends one token, got 3"):
        append(cache, chunk, chunk, jnp.array([3, 3]), implementation="pallas")


def test_append_casts_to_the_cache():
    cache = init_layer_cache(**SIZES, config=None)
    chunk = jnp.full((2, 1, 2, 20), 1 + 2**-10, jnp.float32)
    got = append(cache, chunk, chunk, jnp.array([1, 1]))
    assert got.keys.dtype == jnp.bfloat16 and got.keys[0, 0, 0, 0] == 1
