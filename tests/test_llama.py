"""The decoder's contract: what attend sees, what passes through, dtypes, and use under jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import LlamaConfig
from models.llama import Llama, causal_attention
from tests.checkpoints import TINY

CONFIG = LlamaConfig.from_hf(TINY | {"head_dim": 12})


def whole_sequence(model: Llama, tokens: jax.Array, attend=causal_attention, caches=(None, None)):
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return model(tokens, positions, jnp.full(batch, length), caches, attend)


compiled_whole_sequence = nnx.jit(whole_sequence)


@functools.partial(nnx.jit, static_argnames=("config", "dtype"))
def random_model(seed: int = 0, *, config: LlamaConfig = CONFIG, dtype=jnp.float32) -> Llama:
    return Llama(config, dtype=dtype, rngs=nnx.Rngs(jax.random.key(seed)))


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model()


def test_attend_is_called_once_a_layer_and_owns_the_caches(model):
    seen = []

    def attend(layer, q, k, v, cache):
        seen.append((layer, q.shape, k.shape, v.shape, cache))
        return causal_attention(layer, q, k, v, None)[0], f"after {cache}", {"layer": layer}

    hidden, caches, stats = whole_sequence(model, jnp.ones((3, 5), jnp.int32), attend, ("first", "second"))
    assert hidden.shape == (3, 5, 64)
    assert caches == ("after first", "after second")
    assert stats == ({"layer": 0}, {"layer": 1})
    shapes = (3, 5, 4, 12), (3, 5, 2, 12), (3, 5, 2, 12)
    assert seen == [(0, *shapes, "first"), (1, *shapes, "second")]


def test_refuses_another_number_of_caches(model):
    with pytest.raises(ValueError, match="caches must hold one cache for each of 2 layers, got 3"):
        whole_sequence(model, jnp.ones((1, 2), jnp.int32), caches=(None,) * 3)


def test_later_tokens_do_not_change_earlier_outputs(model):
    tokens = jax.random.randint(jax.random.key(0), (1, 9), 0, 128)
    changed = tokens.at[0, 6:].set(0)
    before, after = (compiled_whole_sequence(model, each)[0][0] for each in (tokens, changed))
    np.testing.assert_array_equal(before[:6], after[:6])
    assert np.abs(before[6:] - after[6:]).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_activations_have_the_models_dtype_and_logits_are_float32(dtype):
    model = random_model(dtype=dtype)
    hidden, _, _ = compiled_whole_sequence(model, jnp.ones((1, 3), jnp.int32))
    assert model.dtype == hidden.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}
    logits = model.logits(hidden[:, -1])
    assert (logits.shape, logits.dtype) == ((1, 128), jnp.float32)


def test_tied_embeddings_are_one_parameter():
    tied = random_model(config=LlamaConfig.from_hf(TINY | {"tie_word_embeddings": True}))
    assert not hasattr(tied, "lm_head")
    hidden = jax.random.normal(jax.random.key(0), (2, 64))
    np.testing.assert_allclose(tied.logits(hidden), hidden @ tied.embed_tokens.weight[...].T, rtol=1e-5, atol=1e-6)


def test_graph_is_a_static_argument_and_equal_models_share_a_compilation(model):
    @functools.partial(jax.jit, static_argnums=0)
    def run(graph, weights, tokens):
        return whole_sequence(nnx.merge(graph, weights), tokens)[0]

    tokens = jnp.ones((1, 4), jnp.int32)
    for seed in range(2):
        run(*nnx.split(random_model(seed)), tokens)
    assert run._cache_size() == 1
    assert nnx.split(model)[0] != nnx.split(Llama.abstract(LlamaConfig.from_hf(TINY)))[0]


def test_abstract_model_has_every_parameter_and_no_memory(model):
    abstract, concrete = nnx.state(Llama.abstract(CONFIG, dtype=jnp.float32)), nnx.state(model)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), concrete
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))


def test_gradients_reach_every_parameter(model):
    @nnx.jit
    @nnx.grad
    def gradients(model):
        hidden, _, _ = whole_sequence(model, jnp.arange(6)[None])
        return jnp.mean(jax.nn.logsumexp(model.logits(hidden), axis=-1) ** 2)

    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients(model)))
