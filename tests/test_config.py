import jax.numpy as jnp
import numpy as np
import pytest

from rabitq_jax import RaBitQConfig

BAD_VALUES = [
    *[("top_p", value) for value in (0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), "0.9", None)],
    *[("sink", value) for value in (-1, 1.5, "4", None, True)],
    *[(name, value) for name in ("recent", "interval") for value in (0, -64, 2.0, True)],
    *[(name, value) for name in ("dense_layers", "rotation_seed") for value in (-1, 0.5, None)],
    *[("failure_rate", value) for value in (0, 0.5, -1e-3, float("nan"), "1e-3", None)],
    ("top_p_scope", "some"),
    ("selection", "sorted"),
    ("tail", "median"),
    ("rotation", "random"),
    ("key_centroid", "mean"),
    ("query_centroid", "block"),
    ("query_rounding", "stochastic"),
    ("scores", "pallas"),
    ("select", "popcount"),
    ("attend", "triton"),
    ("quantize", ""),
]


@pytest.mark.parametrize("name,value", BAD_VALUES)
def test_bad_value_is_named_with_what_came(name, value):
    with pytest.raises(ValueError) as error:
        RaBitQConfig(**{name: value})
    assert str(error.value).startswith(f"{name} must be ")
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    "choices",
    [
        dict(top_p=1),
        dict(top_p=1e-6),
        dict(sink=0, recent=1, interval=1, dense_layers=0),
        dict(rotation="hadamard", key_centroid="prompt", query_centroid="prompt", query_rounding="nearest"),
        dict(selection="certified", failure_rate=0.01, tail="mean"),
        dict(selection="debiased", top_p_scope="scored", rotation="hadamard"),
        dict(scores="int4", select="pallas", attend="xla", quantize="pallas", top_p_scope="scored"),
    ],
)
def test_good_values_are_kept(choices):
    config = RaBitQConfig(**choices)
    assert {name: getattr(config, name) for name in choices} == choices


@pytest.mark.parametrize(
    "choices,message",
    [
        (dict(select="mosaic", scores="popcount"), "scores must be None, got 'popcount'"),
        (dict(tail="mean"), "selection must be 'debiased' or 'certified' for tail 'mean', got 'plain'"),
        (dict(selection="debiased", rotation="none"), "rotation must be random for selection 'debiased', got 'none'"),
        (dict(selection="certified", top_p_scope="scored"), "top_p_scope must be 'all' for selection 'certified', got"),
    ],
)
def test_values_that_contradict_each_other(choices, message):
    with pytest.raises(ValueError, match=message):
        RaBitQConfig(**choices)


def test_equal_configurations_are_one_key():
    table = {RaBitQConfig(top_p=0.9): "a", RaBitQConfig(top_p=0.8): "b"}
    assert table[RaBitQConfig(top_p=0.9)] == "a" and len(table) == 2


def test_quantized_length_leaves_the_recent_window():
    config = RaBitQConfig(recent=64, interval=128)
    for length in range(0, 2000, 7):
        quantized = config.quantized_length(length)
        assert quantized % config.interval == 0
        assert quantized == 0 or config.recent <= length - quantized
        assert length - quantized < config.window
    lengths = np.array([0, 63, 191, 192, 319, 320], np.int32)
    assert config.quantized_length(jnp.asarray(lengths)).tolist() == [0, 0, 0, 128, 128, 256]
