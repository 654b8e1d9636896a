"""Every Pallas kernel lowers for a GPU where there is none: what Pallas cannot lower shows on any machine."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from benchmarks.shapes import Shape
from pallas_kernels import _pallas
from rabitq_jax import attention, codes, gathered_attention, scores, token_list, top_p
from rabitq_jax.cache import append, init_layer_cache
from rabitq_jax.config import RaBitQConfig
from tests.kernel_cases import score_inputs

pytestmark = pytest.mark.kernel

SHAPES = [Shape(2, 2, 4, 1024, 128), Shape(3, 1, 5, 1536, 20), Shape(1, 2, 7, 512, 80)]
INTERVAL = 64


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def kernel_text(monkeypatch, function, *arguments) -> str:
    """The program for CUDA, its kernels lowered."""
    monkeypatch.setattr(_pallas, "interpret", lambda: False)
    # JAX 0.11 and newer lower a kernel for a device that is present or named.
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("gpu",), (AxisType.Auto,), abstract_device=device)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("implementation", ["popcount", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_lower(shape, implementation, bias, monkeypatch):
    *arrays, _, shift = jax.eval_shape(functools.partial(score_inputs, shape, centroids=4, bias=bias))

    def score(arrays, shift, length):
        return scores.IMPLEMENTATIONS[implementation](*arrays, 0.125, shift, length=length)

    text = kernel_text(monkeypatch, score, arrays, shift, array(shape.batch, dtype=jnp.int32))
    assert f"{implementation}_scores" in text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selection_lowers(shape, monkeypatch):
    select = functools.partial(top_p.select_top_p, sink=5, top_p=0.9, implementation="pallas")
    heads, length = (shape.batch, shape.kv_heads, shape.group), array(shape.batch, dtype=jnp.int32)
    text = kernel_text(monkeypatch, select, array(*heads, shape.tokens), array(*heads), length, length)
    assert all(kernel in text for kernel in ("top_p_histogram", "top_p_threshold", "top_p_mark", "list_tokens"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_of_a_mask_lower(shape, monkeypatch):
    list_tokens = functools.partial(token_list.list_tokens, implementation="pallas")
    mask = array(shape.batch, shape.kv_heads, shape.tokens, dtype=bool)
    assert "list_tokens" in kernel_text(monkeypatch, list_tokens, mask, array(shape.batch, dtype=jnp.int32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathered_attention_lowers(shape, dtype, monkeypatch):
    attend = functools.partial(gathered_attention.gathered_attention, softmax_scale=0.1, implementation="pallas")
    rows = (shape.batch, shape.kv_heads)
    kv = array(*rows, shape.tokens, shape.head_dim, dtype=dtype)
    indices, counts = array(*rows, shape.tokens, dtype=jnp.int32), array(*rows, dtype=jnp.int32)
    query = array(*rows, shape.group, shape.head_dim, dtype=dtype)
    text = kernel_text(monkeypatch, attend, query, kv, kv, indices, counts)
    assert "gathered_attention" in text and "combine_parts" in text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_append_lowers(shape, monkeypatch):
    layer = jax.eval_shape(lambda: init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, None))
    token, new = array(shape.batch, 1, shape.kv_heads, shape.head_dim), array(shape.batch, dtype=jnp.int32)
    append_kernel = functools.partial(append, implementation="pallas")
    assert "append_token" in kernel_text(monkeypatch, append_kernel, layer, token, token, new)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_certified_attention_lowers(shape, monkeypatch):
    config = RaBitQConfig(
        selection="certified", tail="mean", interval=INTERVAL, query_rounding="nearest", scores="popcount",
        select="pallas", attend="pallas",
    )  # fmt: skip
    sizes = (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
    cache = jax.eval_shape(functools.partial(init_layer_cache, *sizes, config))
    query = array(shape.batch, shape.kv_heads, shape.group, shape.head_dim, dtype=jnp.bfloat16)

    def step(query, cache):
        out, _, stats = attention.attend_selected(query, cache, config, 0.1, None)
        return out, stats

    text = kernel_text(monkeypatch, step, query, cache)
    kernels = ("masses_below", "top_p_mark", "list_tokens", "gathered_attention", "found_tokens", "combine_parts")
    assert all(kernel in text for kernel in kernels)
    assert "top_p_histogram" not in text


@pytest.mark.parametrize("key_centroid,query_centroid", [("block", "none"), ("prompt", "prompt")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_keys_lowers(shape, key_centroid, query_centroid, monkeypatch):
    config = RaBitQConfig(interval=INTERVAL, key_centroid=key_centroid, query_centroid=query_centroid)
    sizes = (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
    cache = jax.eval_shape(functools.partial(init_layer_cache, *sizes, config))
    update = functools.partial(codes.update_codes, interval=INTERVAL, max_blocks=4, implementation="pallas")
    block = array(shape.batch, dtype=jnp.int32)
    assert "quantize_keys" in kernel_text(monkeypatch, update, cache.keys, cache.codes, block, block)
