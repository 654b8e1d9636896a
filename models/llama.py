"""Llama in Flax NNX: a decoder that leaves attention to its caller.

Modules and parameters are named as in Hugging Face's LlamaForCausalLM, and weights of linear layers are stored [in,
out], the transpose of Hugging Face's. Projections of the same input are one matrix here, `qkv_proj` and `gate_up_proj`:
for one token, reading a small matrix takes several times as long as its bytes would.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import LlamaConfig
from models.rope import apply_rope, inverse_frequencies

# attend(layer, q [B,N,H,D], k [B,N,K,D], v [B,N,K,D], cache) -> (out [B,N,H,D], cache, stats), q and k after rope.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any, Any]]

INIT_STD = 0.02


class Llama(nnx.Module):
    """A Llama decoder with a head for the next token.

    Args:
      config: kept as `model.config`, static.
      dtype: of parameters and activations.
      rngs: its stream `params` draws the weights.
    """

    def __init__(self, config: LlamaConfig, *, dtype=jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)

    @classmethod
    def abstract(cls, config: LlamaConfig, *, dtype=jnp.bfloat16) -> "Llama":
        """A model whose parameters are shapes and dtypes without memory, to be filled by a checkpoint's."""
        return nnx.eval_shape(lambda: cls(config, dtype=dtype, rngs=nnx.Rngs(0)))

    @property
    def dtype(self) -> jnp.dtype:
        return self.norm.weight.dtype

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        total_length: jax.Array,
        caches: tuple[Any, ...],
        attend: Attend,
    ) -> tuple[jax.Array, tuple[Any, ...], tuple[Any, ...]]:
        """Run the decoder over a chunk of new tokens, or one.

        Args:
          tokens: int32 [B,N].
          positions: int32 [B,N], each token's place in its sequence.
          total_length: int32 [B], tokens of each sequence once these are in it; for a chunk of a prompt, the whole
            prompt's length. Only dynamic rope reads it.
          caches: one a layer, passed on to `attend`, whatever they are.
          attend: see `Attend`; called once a layer, in order.

        Returns:
          Hidden states [B,N,hidden] after the last norm, ready for `logits`; the layers' new caches; their stats.

        Raises:
          ValueError: there is not one cache a layer.
        """
        if len(caches) != self.config.num_layers:
            raise ValueError(
                f"caches must hold one cache for each of {self.config.num_layers} layers, got {len(caches)}"
            )
        frequencies = inverse_frequencies(self.config.rope, self.config.head_dim, total_length)
        rotate = functools.partial(apply_rope, positions=positions, frequencies=frequencies)
        hidden = self.embed_tokens(tokens)
        new_caches, stats = [], []
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                hidden, new_cache, layer_stats = layer(hidden, rotate, functools.partial(attend, index), cache)
            new_caches.append(new_cache)
            stats.append(layer_stats)
        return self.norm(hidden), tuple(new_caches), tuple(stats)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of the next token, float32 [..., vocab], from hidden states [..., hidden]."""
        head = self.embed_tokens.weight[...].T if self.config.tie_embeddings else self.lm_head.weight[...]
        return _matmul(hidden, head, jnp.float32)


class DecoderLayer(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, hidden, rotate, attend, cache):
        """[B,N,hidden] -> [B,N,hidden], the new cache, stats."""
        attended, cache, stats = self.self_attn(self.input_layernorm(hidden), rotate, attend, cache)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache, stats


class Attention(nnx.Module):
    """The projections around attention, which is the caller's."""

    def __init__(self, config: LlamaConfig, *, dtype, rngs: nnx.Rngs):
        linear = functools.partial(Linear, bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = linear(config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        self.o_proj = linear(config.num_heads * config.head_dim, config.hidden_size)

    def __call__(self, hidden, rotate, attend, cache):
        """[B,N,hidden] -> [B,N,hidden], the new cache, stats."""
        heads = self.qkv_proj(hidden).reshape(*hidden.shape[:-1], -1, self.head_dim)
        q, k, v = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=-2)
        out, cache, stats = attend(rotate(q), rotate(k), v, cache)
        return self.o_proj(out.reshape(*hidden.shape[:-1], -1)), cache, stats


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype, rngs: nnx.Rngs):
        linear = functools.partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_up_proj = linear(config.hidden_size, 2 * config.mlp_size)
        self.down_proj = linear(config.mlp_size, config.hidden_size)

    def __call__(self, hidden):
        gate, up = jnp.split(self.gate_up_proj(hidden), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)


class Linear(nnx.Module):
    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x):
        out = _matmul(x, self.weight[...], x.dtype)
        return out if self.bias is None else out + self.bias[...]


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, hidden_size: int, *, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (vocab_size, hidden_size), dtype))

    def __call__(self, tokens):
        return self.weight[...][tokens]


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float, *, dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)


def causal_attention(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: None) -> tuple[jax.Array, None, None]:
    """An `Attend` for whole sequences without a cache: exact causal attention, for training and tests."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    precision = _precision(q.dtype)
    scores = jnp.einsum("bnkgd,btkd->bkgnt", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores * head_dim**-0.5, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgnt,btkd->bnkgd", weights.astype(v.dtype), v, precision=precision)
    return out.reshape(q.shape), cache, None


def _matmul(x, weight, dtype):
    return jnp.matmul(x, weight, precision=_precision(x.dtype), preferred_element_type=dtype)


def _precision(dtype) -> str | None:
    # By default GPUs multiply float32 in TF32, with 10 bits of mantissa.
    return "highest" if dtype == jnp.float32 else None


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype) -> jax.Array:
    return INIT_STD * jax.random.normal(rngs.params(), shape, dtype)
