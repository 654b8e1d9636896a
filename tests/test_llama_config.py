"""LlamaConfig and rotary embedding: what a config.json says, and the frequencies that follow."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import LlamaConfig, RopeConfig
from models.rope import apply_rope, inverse_frequencies
from tests.checkpoints import TINY

ROPES = {
    "default": RopeConfig(theta=5000.0),
    "linear": RopeConfig(kind="linear", factor=8.0),
    "dynamic": RopeConfig(kind="dynamic", factor=2.0, original_max_position=256),
    "llama3": RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_max_position=128),
}


def test_reads_every_size():
    config = LlamaConfig.from_hf(TINY | {"head_dim": 20, "attention_bias": True, "bos_token_id": 1, "eos_token_id": 2})
    assert config == LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        mlp_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=20,
        norm_eps=1e-5,
        max_position=256,
        attention_bias=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_absent_keys_have_the_defaults_of_transformers():
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig.from_hf({"model_type": "llama"} | {key: TINY[key] for key in required})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.max_position) == (4, 16, 1e-6, 2048)
    assert config.rope == RopeConfig(kind="default", theta=10000.0)
    assert not (config.attention_bias or config.mlp_bias or config.tie_embeddings or config.eos_token_ids)


@pytest.mark.parametrize(("value", "want"), [(None, ()), (5, (5,)), ([5, 7], (5, 7)), ([], ())])
def test_eos_token_id_is_a_number_a_list_or_null(value, want):
    assert LlamaConfig.from_hf(TINY | {"eos_token_id": value}).eos_token_ids == want


LLAMA3 = {
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("default", {"rope_theta": 5000, "rope_scaling": None}),
        ("default", {"rope_theta": None, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}),
        ("default", {"rope_theta": 5000.0, "rope_parameters": {}}),
        ("linear", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
        ("linear", {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8}}),
        ("linear", {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}),
        ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("llama3", {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}),
        ("llama3", {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0}}),
    ],
)
def test_reads_both_styles_of_rope(kind, changes):
    assert LlamaConfig.from_hf(TINY | changes).rope == ROPES[kind]


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("eos", [(), (3,), (3, 5)])
def test_written_config_reads_as_the_same(kind, eos):
    config = dataclasses.replace(LlamaConfig.from_hf(TINY), rope=ROPES[kind], mlp_bias=True, eos_token_ids=eos)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type must be one of .* got 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1, got 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": ["linear", 4.0]}, "rope_scaling and rope_parameters must be objects"),
        ({"rope_theta": -1.0}, "rope theta must be positive, got -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"vocab_size": "128"}, "vocab_size must be of type int, got '128'"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be of type bool"),
        ({"num_hidden_layers": 0}, "num_layers must be positive, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({"num_attention_heads": 3}, "hidden_size 64 is not a multiple of num_attention_heads 3"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 17}, "head_dim must be even .* got 17"),
        ({"rms_norm_eps": 0.0}, "norm_eps must be positive"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be .* got '</s>'"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
    ],
)
def test_refuses_what_it_does_not_support(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(TINY | changes)


def test_refuses_a_config_that_names_no_architecture():
    with pytest.raises(ValueError, match="architectures nor a model_type"):
        LlamaConfig.from_hf({"vocab_size": 128})


def test_rope_turns_pairs_of_halves():
    """Against complex multiplication in float64; a dot product depends on the distance of the positions alone."""
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 20)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 30, 31, 200]], np.int32)
    frequencies = inverse_frequencies(RopeConfig(), 20, jnp.array([5, 201]))
    angles = positions[:, :, None, None] * 10000.0 ** -(np.arange(10) / 10)
    turned = (x[..., :10] + 1j * x[..., 10:]) * np.exp(1j * angles)
    got = apply_rope(jnp.asarray(x), jnp.asarray(positions), frequencies)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=3e-5)
    assert apply_rope(jnp.asarray(x, jnp.bfloat16), positions, frequencies).dtype == jnp.bfloat16


def test_linear_divides_positions():
    linear, default = (inverse_frequencies(ROPES[kind], 16, jnp.array([9])) for kind in ("linear", "default"))
    assert linear.shape == default.shape == (1, 8)
    np.testing.assert_allclose(linear[0, 0], 1 / 8)
    np.testing.assert_allclose(linear * 8, inverse_frequencies(RopeConfig(), 16, jnp.array([9])), rtol=1e-6)


def test_dynamic_depends_on_each_sequence_length():
    """The NTK formula of transformers: theta * (factor * length / max - (factor - 1)) ** (D / (D - 2))."""
    lengths = np.array([1, 256, 257, 1000])
    got = jax.jit(lambda total: inverse_frequencies(ROPES["dynamic"], 20, total))(lengths)
    growth = 2.0 * np.maximum(lengths, 256) / 256 - 1
    theta = 10000.0 * growth[:, None] ** (20 / 18)
    np.testing.assert_allclose(got, theta ** -(np.arange(10) / 10), rtol=1e-6)
    np.testing.assert_array_equal(got[0], got[1])


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 64, jnp.array([1]))[0]
    got = inverse_frequencies(ROPES["llama3"], 64, jnp.array([1]))[0]
    wavelength = 2 * math.pi / np.asarray(plain)
    short, long = wavelength < 128 / 4, wavelength > 128
    np.testing.assert_array_equal(got[short], plain[short])
    np.testing.assert_allclose(got[long], plain[long] / 8, rtol=1e-6)
    between = np.asarray(got / plain)[~short & ~long]
    assert between.size >= 2
    assert np.all((between > 1 / 8) & (between < 1))
    assert np.all(np.diff(got) < 0)
