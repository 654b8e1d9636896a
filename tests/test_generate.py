"""generate: dense and sparse decoding, ragged batches, conversations, streaming, and what it refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Llama, LlamaConfig, causal_attention
from rabitq_jax import RaBitQConfig, Sampling, generate, generation, init_cache
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.decoding import ModelDefinition, decode_steps, prefill_chunk, start_decoding

MODEL_CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=20,
    max_position=4096,
)
CONFIG = RaBitQConfig(top_p=0.8, sink=4, recent=16, interval=32, dense_layers=1)
EXACT = dataclasses.replace(CONFIG, top_p=1.0)
KERNELS = {"scores": "popcount", "select": "pallas", "attend": "pallas", "quantize": "pallas"}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    model = Llama(MODEL_CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    # At its initial 0.02 a random model repeats itself: larger weights make attention and tokens vary.
    state = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, nnx.state(model))
    nnx.update(model, state)
    return model


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, MODEL_CONFIG.vocab_size, length).tolist()


def greedy_by_recomputation(model, tokens, steps):
    """Greedy tokens from whole causal forward passes: no cache, no decode step."""
    forward = jax.jit(lambda sequence: model.logits(model(*_whole(sequence), (None,) * 2, causal_attention)[0]))
    padded = np.zeros(len(tokens) + steps, np.int32)
    padded[: len(tokens)] = tokens
    for i in range(len(tokens), len(padded)):
        padded[i] = int(jnp.argmax(forward(padded[None])[0, i - 1]))
    return padded[len(tokens) :]


def _whole(sequence):
    return sequence, jnp.arange(sequence.shape[1])[None], jnp.full((1,), sequence.shape[1])


@pytest.mark.kernel
@pytest.mark.parametrize("config", [None, EXACT], ids=["dense", "p=1"])
def test_greedy_tokens_equal_those_of_whole_forward_passes(model, config):
    out = generate(model, prompt(120), config, max_new_tokens=16, key=KEY)
    np.testing.assert_array_equal(out.tokens[0], greedy_by_recomputation(model, prompt(120), 16))
    assert out.lengths[0] == 16 and out.finite[0]
    assert out.cache.length[0] == 136
    np.testing.assert_allclose(out.stats.kept_fraction, 1.0)


@pytest.mark.kernel
@pytest.mark.parametrize("selection", ["plain", "certified"])
def test_kernels_give_the_tokens_of_dense_attention(model, selection):
    exact = dataclasses.replace(EXACT, selection=selection, **KERNELS)
    out = generate(model, prompt(120), exact, max_new_tokens=16, key=KEY)
    np.testing.assert_array_equal(out.tokens, generate(model, prompt(120), None, max_new_tokens=16, key=KEY).tokens)
    assert out.finite[0]


def test_a_sequence_of_a_ragged_batch_gets_the_tokens_that_it_gets_alone(model):
    prompts = [prompt(120, 1), prompt(66, 2), prompt(97, 3)]
    together = generate(model, prompts, EXACT, max_new_tokens=16, key=KEY)
    for b, alone in enumerate(prompts):
        np.testing.assert_array_equal(
            together.tokens[b], generate(model, alone, None, max_new_tokens=16, key=KEY).tokens[0]
        )


def test_stats_of_sparse_decoding(model):
    prompts = [prompt(300, 4), prompt(280, 5)]
    out = generate(model, prompts, CONFIG, max_new_tokens=12, key=KEY)
    stats = out.stats
    np.testing.assert_array_equal(stats.length, np.array([300, 280])[:, None] + 1 + np.arange(12))
    np.testing.assert_array_equal(stats.kept[:, :, 0], np.broadcast_to(stats.length[..., None], (2, 12, 2)))
    sparse = stats.kept[:, :, 1:]
    assert np.all(sparse < stats.length[..., None, None]) and np.all(sparse >= CONFIG.sink + CONFIG.recent)
    assert np.all(stats.mass >= CONFIG.top_p - 1e-5)
    assert np.all((stats.kept_fraction > 0) & (stats.kept_fraction < 1))
    assert np.all(stats.bytes_read_fraction < 1)
    np.testing.assert_allclose(stats.bytes_dense, stats.length[..., None] * np.full(2, 2 * 2 * 20 * 4.0))


def test_stats_of_certified_decoding(model):
    config = dataclasses.replace(CONFIG, selection="certified", failure_rate=1e-2, tail="mean")
    prompts = [prompt(300, 4), prompt(280, 5)]
    out = generate(model, prompts, config, max_new_tokens=12, key=KEY)
    stats = out.stats
    assert stats.verified.shape == stats.bound.shape == stats.extended.shape == stats.certified.shape == (2, 12, 2)
    # The first layer is dense.
    assert np.all(stats.verified[..., 0] == 1) and np.all(stats.bound[..., 0] == 1)
    assert np.all(stats.extended[..., 0] == 0) and np.all(stats.certified[..., 0] == 1)
    sparse = stats.kept[:, :, 1:]
    assert np.all(sparse <= stats.length[..., None, None]) and np.any(sparse < stats.length[..., None, None])
    assert np.all(stats.verified[..., 1] > config.top_p) and np.all(stats.bound <= stats.verified + 1e-6)
    assert np.mean(stats.certified) > 0.9
    assert out.cache.layers[0].scored_values is None and out.cache.layers[1].scored_values.shape == (2, 2, 20)
    with pytest.raises(ValueError, match="another config or model"):
        generate(model, prompts, CONFIG, max_new_tokens=1, key=KEY, cache=out.cache)
    assert generate(model, prompts, CONFIG, max_new_tokens=1, key=KEY).stats.verified is None


@pytest.mark.parametrize("config", [None, CONFIG], ids=["dense", "sparse"])
def test_a_conversation_goes_on_without_its_first_part(model, config):
    first, second = prompt(120, 6), prompt(100, 7)
    exact = None if config is None else EXACT
    begun = generate(model, first, exact, max_new_tokens=16, key=KEY)
    whole = first + begun.tokens[0].tolist() + second
    goes_on = generate(model, second, exact, max_new_tokens=16, key=KEY, cache=begun.cache)
    assert goes_on.cache.length[0] == len(whole) + 16
    np.testing.assert_array_equal(goes_on.tokens, generate(model, whole, None, max_new_tokens=16, key=KEY).tokens)


@pytest.mark.parametrize("config", [None, EXACT], ids=["dense", "p=1"])
def test_a_prompt_in_several_chunks_gives_the_same(model, config, monkeypatch):
    prompts = [prompt(120, 1), prompt(66, 2)]
    whole = generate(model, prompts, config, max_new_tokens=16, key=KEY)
    monkeypatch.setattr("rabitq_jax.generation._chunk_size", lambda batch, *, fresh: 64 if fresh else 16)
    np.testing.assert_array_equal(generate(model, prompts, config, max_new_tokens=16, key=KEY).tokens, whole.tokens)


def test_mosaic_is_refused_where_it_cannot_run(model):
    if on_hopper():
        pytest.skip("this is a Hopper GPU")
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        generate(model, prompt(120), dataclasses.replace(CONFIG, select="mosaic"), max_new_tokens=16, key=KEY)


def test_the_same_key_gives_the_same_tokens_and_another_does_not(model):
    def draw(seed):
        out = generate(
            model, prompt(120), CONFIG, max_new_tokens=16, key=jax.random.key(seed), sampling=Sampling(temperature=1.0)
        )
        return out.tokens[0].tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_calls_of_several_steps_change_nothing(model, monkeypatch):
    """A sequence that ends within a call, one that goes on to a last call that is not full, and their stats."""
    prompts = [prompt(40, 1), prompt(33, 2)]
    free = generate(model, prompts, CONFIG, max_new_tokens=11, key=KEY)
    eos = next(int(token) for token in free.tokens[0, 2:] if token not in free.tokens[1])
    one, several = (run_with_steps(model, prompts, eos, steps, monkeypatch) for steps in (1, 4))
    assert one.lengths[0] < 11 and one.lengths[1] == 11
    parts = lambda out: (out.tokens, out.lengths, out.finite, out.stats, out.cache.length)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, parts(several), parts(one))


def test_steps_past_the_stop_change_nothing(model):
    definition, params, _ = decode_state(model, CONFIG, num_steps=8)

    def run(*stops):
        state = decode_state(model, CONFIG, num_steps=8)[2]
        for stop in stops:
            state, _ = decode_steps(
                definition, params, state, KEY, jnp.int32(stop),
                num_steps=4, config=CONFIG, sampling=Sampling(), eos_token_ids=(),
            )  # fmt: skip
        return state

    jax.tree.map(np.testing.assert_array_equal, run(1, 4, 7, 8), run(4, 8))


def run_with_steps(model, prompts, eos, steps, monkeypatch):
    monkeypatch.setattr(generation, "_steps_per_call", lambda _: steps)
    return generate(model, prompts, CONFIG, max_new_tokens=11, key=KEY, eos_token_ids=[eos])


def test_streaming_hands_out_the_same_tokens(model):
    prompts = [prompt(120), prompt(66, 8)]
    sampling = Sampling(temperature=1.0)
    plain = generate(model, prompts, CONFIG, max_new_tokens=9, key=KEY, sampling=sampling)
    # Ends the first sequence at its third token, and the second wherever the token comes up, if it does.
    eos = (int(plain.tokens[0, 2]),)
    calls = []
    streamed = generate(
        model, prompts, CONFIG, max_new_tokens=9, key=KEY, sampling=sampling, eos_token_ids=eos,
        on_token=lambda step, tokens: calls.append((step, tokens.copy())),
    )  # fmt: skip
    assert [step for step, _ in calls] == list(range(streamed.lengths.max()))
    handed_out = np.stack([tokens for _, tokens in calls], axis=1)
    held = np.arange(handed_out.shape[1]) < streamed.lengths[:, None]
    np.testing.assert_array_equal(handed_out, np.where(held, streamed.tokens[:, : handed_out.shape[1]], -1))


def test_eos_ends_a_sequence_and_the_others_go_on(model):
    prompts = [prompt(70, 9), prompt(120, 10)]
    free = generate(model, prompts, None, max_new_tokens=16, key=KEY)
    only_first = set(free.tokens[0].tolist()) - set(free.tokens[1].tolist())
    eos = next(token for token in free.tokens[0].tolist() if token in only_first)
    end = free.tokens[0].tolist().index(eos) + 1
    out = generate(model, prompts, None, max_new_tokens=16, key=KEY, eos_token_ids=[eos])
    assert out.lengths.tolist() == [end, 16]
    np.testing.assert_array_equal(out.tokens[0, :end], free.tokens[0, :end])
    assert np.all(out.tokens[0, end:] == 0)
    np.testing.assert_array_equal(out.tokens[1], free.tokens[1])
    assert out.cache.length.tolist() == [70 + end, 136]
    assert np.all(out.stats.length[0, end:] == 0)


def test_the_models_eos_tokens_are_the_default(model):
    free = generate(model, prompt(120, 9), None, max_new_tokens=16, key=KEY, eos_token_ids=())
    ending = nnx.clone(model)
    ending.config = dataclasses.replace(MODEL_CONFIG, eos_token_ids=(96, int(free.tokens[0, 0])))
    assert generate(ending, prompt(120, 9), None, max_new_tokens=16, key=KEY).lengths[0] == 1


def test_nan_in_the_weights_shows_in_the_result(model):
    broken = nnx.clone(model)
    weight = broken.layers[1].self_attn.qkv_proj.weight
    first_key = MODEL_CONFIG.num_heads * MODEL_CONFIG.head_dim
    weight.set_value(weight[...].at[0, first_key].set(jnp.nan))
    assert not generate(broken, prompt(120), CONFIG, max_new_tokens=16, key=KEY).finite[0]
    assert generate(model, prompt(120), CONFIG, max_new_tokens=16, key=KEY).finite[0]


@pytest.mark.parametrize(
    "tokens,message",
    [
        ([], "empty"),
        ([[1, 2], []], "prompt 1 is empty"),
        ([1, 97], "token 97.*vocabulary of 97"),
        ([[5], [-1]], "prompt 1 has token -1"),
        ([0.5, 1.0], "prompt 0 must be a list of token ids"),
        ([[[1]]], "prompt 0 must be a list of token ids"),
    ],
)
def test_refuses_bad_prompts(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, CONFIG, max_new_tokens=1, key=KEY)


def test_refuses_what_does_not_fit(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, [1], CONFIG, max_new_tokens=0, key=KEY)
    with pytest.raises(ValueError, match="capacity is 512 tokens, but 520 are needed"):
        generate(model, prompt(500), CONFIG, max_new_tokens=20, key=KEY, capacity=512)
    with pytest.raises(ValueError, match="capacity must be a multiple of 512"):
        generate(model, [1], CONFIG, max_new_tokens=1, key=KEY, capacity=100)


def test_a_refused_continuation_loses_nothing(model):
    begun = generate(model, prompt(480), CONFIG, max_new_tokens=9, key=KEY)
    with pytest.raises(ValueError, match="up to 489 in the cache"):
        generate(model, prompt(14), CONFIG, max_new_tokens=10, key=KEY, cache=begun.cache)
    assert begun.cache.length[0] == 489
    assert generate(model, prompt(14), CONFIG, max_new_tokens=9, key=KEY, cache=begun.cache).lengths[0] == 9


@pytest.mark.parametrize(
    "change,message",
    [
        ({"config": None}, "other parts"),
        ({"config": dataclasses.replace(CONFIG, dense_layers=2)}, "other parts"),
        ({"config": dataclasses.replace(CONFIG, interval=64)}, r"key_centroids must be bfloat16 \(1, 2, 8, 20\)"),
        ({"config": dataclasses.replace(CONFIG, rotation_seed=1)}, "rotation_seed 0.*has 1"),
        ({"tokens": [[1], [2]]}, r"must be float32 \(2, 2, 512, 20\), got float32 \(1, 2, 512, 20\)"),
        ({"capacity": 1024}, "capacity is 1024"),
    ],
)
def test_refuses_a_cache_that_was_made_for_something_else(model, change, message):
    cache = init_cache(MODEL_CONFIG, 1, 512, CONFIG, dtype=jnp.float32)
    arguments = {"tokens": [1], "config": CONFIG, "cache": cache} | change
    with pytest.raises(ValueError, match=message):
        generate(model, max_new_tokens=1, key=KEY, **arguments)


def test_warns_past_the_models_range(model):
    short = nnx.clone(model)
    short.config = dataclasses.replace(MODEL_CONFIG, max_position=64)
    with pytest.warns(UserWarning, match="make 65 positions; the model was made for 64"):
        generate(short, prompt(60), None, max_new_tokens=5, key=KEY)


def decode_state(model, config, capacity=512, num_steps=512):
    definition, params = ModelDefinition.split(model)
    cache = init_cache(model.config, 2, capacity, config, dtype=model.dtype)
    tokens = np.array([prompt(100), prompt(100, 1)], np.int32)
    cache, hidden = prefill_chunk(
        definition, params, cache, jnp.zeros((2, 32), model.dtype), tokens, np.array([100, 60]), np.array([100, 60]),
        config=config, fresh=True, last=True,
    )  # fmt: skip
    return (
        definition,
        params,
        start_decoding(definition, params, cache, hidden, KEY, sampling=Sampling(), num_steps=num_steps),
    )


def test_300_steps_across_blocks_compile_once(model):
    definition, params, state = decode_state(model, CONFIG)
    before = decode_steps._cache_size()
    for step in range(300):
        state, _ = decode_steps(
            definition, params, state, KEY, jnp.int32(step + 1),
            num_steps=1, config=CONFIG, sampling=Sampling(), eos_token_ids=(),
        )  # fmt: skip
        # A model is split anew in each call of generate.
        definition = ModelDefinition.split(model)[0] if step % 100 == 0 else definition
    assert decode_steps._cache_size() == before + 1
    assert state.cache.length.tolist() == [400, 360]
    assert state.cache.quantized.tolist() == [384, 320]


def compile_decode_steps(model, config):
    definition, params, state = decode_state(model, config, capacity=8192, num_steps=8)
    compiled = decode_steps.lower(
        definition, params, state, KEY, jnp.int32(8),
        num_steps=8, config=config, sampling=Sampling(), eos_token_ids=(),
    ).compile()  # fmt: skip
    return compiled, state.cache.to_cache()


def copies(compiled, array):
    """Instructions of the compiled program that copy an array of this shape and dtype."""
    name = {"float32": "f32", "bfloat16": "bf16", "uint32": "u32"}[array.dtype.name]
    pattern = rf"= \(?{name}\[{','.join(map(str, array.shape))}\]\S* copy(-start)?\("
    return [line for line in compiled.as_text().splitlines() if re.search(pattern, line)]


@pytest.mark.parametrize("config", [None, CONFIG], ids=["dense", "sparse"])
def test_a_decode_step_does_not_copy_keys_and_values(model, config):
    compiled, cache = compile_decode_steps(model, config)
    memory = compiled.memory_analysis()
    # All of the cache goes out in the buffers that it came in.
    assert memory.alias_size_in_bytes >= cache.nbytes
    # Decoding needs room for scores and unpacked signs of one layer, not for another cache.
    assert memory.temp_size_in_bytes < cache.nbytes
    assert copies(compiled, cache.layers[1].keys) == []


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [20, 64])
def test_on_a_gpu_a_decode_step_copies_no_part_of_the_cache(head_dim):
    shape = dataclasses.replace(MODEL_CONFIG, head_dim=head_dim)
    model = Llama(shape, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    compiled, cache = compile_decode_steps(model, CONFIG)
    codes = cache.layers[1].codes
    for array in (cache.layers[0].keys, codes.bits, codes.scale, codes.key_centroids):
        assert copies(compiled, array) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.nbytes
