"""The decoder against stored outputs of transformers; parity/make_references.py makes them and checks them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.llama import Llama, causal_attention
from models.tokenizer import Tokenizer
from tests.checkpoints import load, write_tokenizer
from tests.parity.cases import CASES, MIN_MARGIN, NEW_TOKENS, chat_references, make_folder, reference
from tests.parity.chats import CONVERSATIONS, TEMPLATES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_greedy_tokens_are_those_of_transformers(case, tmp_path):
    model, want = load(make_folder(case, tmp_path)), reference(case)
    logits, tokens = greedy(model, want.prompt)
    np.testing.assert_allclose(logits, want.logits, rtol=0, atol=1e-4)
    assert tokens == want.greedy_tokens.tolist()
    assert MIN_MARGIN > 10 * np.abs(logits - want.logits).max()


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.name)
def test_whole_sequence_without_cache_gives_the_same(case, tmp_path):
    model, want = load(make_folder(case, tmp_path)), reference(case)
    tokens = np.concatenate([want.prompt, want.greedy_tokens])[None]
    length = tokens.shape[1]
    hidden, caches, stats = model(
        tokens, np.arange(length)[None], np.array([length]), (None,) * model.config.num_layers, causal_attention
    )
    best = np.argmax(model.logits(hidden)[0], axis=-1)
    assert best[want.prompt.size - 1 : -1].tolist() == want.greedy_tokens.tolist()
    assert set(caches) == set(stats) == {None}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_those_of_transformers(template, conversation, tmp_path):
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path, chat_template=TEMPLATES[template]))
    want, messages = chat_references()[template][conversation], CONVERSATIONS[conversation]
    prompt = {"add_generation_prompt": conversation != "closed"}
    assert tokenizer.render_chat(messages, **prompt) == want["text"]
    assert tokenizer.apply_chat_template(messages, **prompt) == want["token_ids"]


def greedy(model: Llama, prompt: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Logits [prompt,vocab] and NEW_TOKENS greedy tokens, with a dense cache [B,K,T,D] of keys and values a layer."""
    graph, weights = nnx.split(model)
    config = model.config
    zeros = jnp.zeros((1, config.num_kv_heads, prompt.size + NEW_TOKENS, config.head_dim))

    @functools.partial(jax.jit, donate_argnums=2)
    def step(weights, tokens, caches, start):
        positions = start + jnp.arange(tokens.shape[1])[None]
        attend = functools.partial(dense_attention, start=start)
        hidden, caches, _ = nnx.merge(graph, weights)(tokens, positions, positions[:, -1] + 1, caches, attend)
        return nnx.merge(graph, weights).logits(hidden)[0], caches

    caches = tuple((zeros.copy(), zeros.copy()) for _ in range(config.num_layers))
    logits, caches = step(weights, prompt[None], caches, 0)
    tokens = [int(jnp.argmax(logits[-1]))]
    for position in range(prompt.size, prompt.size + NEW_TOKENS - 1):
        last, caches = step(weights, np.array([tokens[-1:]], np.int32), caches, position)
        tokens.append(int(jnp.argmax(last[0])))
    return np.asarray(logits), tokens


def dense_attention(layer, q, k, v, cache, *, start):
    """An `attend` that writes into a dense cache; plain einsum, to share nothing with the library's attention."""
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(held, new.transpose(0, 2, 1, 3), start, axis=2)
        for held, new in zip(cache, (k, v), strict=True)
    )
    group = q.shape[2] // k.shape[2]
    scores = jnp.einsum("bnhd,bhtd->bhnt", q, jnp.repeat(keys, group, axis=1)) / q.shape[-1] ** 0.5
    hidden = jnp.arange(keys.shape[2]) > start + jnp.arange(q.shape[1])[:, None]
    weights = jax.nn.softmax(jnp.where(hidden, -jnp.inf, scores), axis=-1)
    return jnp.einsum("bhnt,bhtd->bnhd", weights, jnp.repeat(values, group, axis=1)), (keys, values), None
