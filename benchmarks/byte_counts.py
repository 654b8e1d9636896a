"""Bytes that an operation must move: each input and each output once, whatever lies between.

K kv heads of G query heads, D dimensions, W words of code. Queries, outputs and histograms of a step are left out: they
do not grow with the context.
"""

import jax
from flax import nnx

from models import Llama
from rabitq_jax.cache import LayerCache

INDEX = 4


def scored_tokens(cache: LayerCache, sink: int) -> int:
    """Tokens that have a score, summed over sequences and kv heads."""
    return cache.keys.shape[1] * int((cache.quantized - sink).clip(0).sum())


def code_bytes(cache: LayerCache, sink: int) -> float:
    """Codes of the scored tokens, each 4 W + 2 bytes (+ 2 with a query centroid), and their share of centroids."""
    assert cache.codes is not None
    return scored_tokens(cache, sink) * (cache.codes.bytes_per_token + cache.codes.centroid_bytes_per_token)


def score_bytes(cache: LayerCache, sink: int, group: int, score_size: int) -> float:
    """Codes in, and a score of `score_size` bytes for each token and query head out."""
    return code_bytes(cache, sink) + scored_tokens(cache, sink) * group * score_size


def selection_bytes(cache: LayerCache, sink: int, group: int, score_size: int, kept: int) -> float:
    """Scores in, and the numbers of the kept tokens out."""
    return scored_tokens(cache, sink) * group * score_size + INDEX * kept


def attention_bytes(cache: LayerCache, kept: int) -> float:
    """Keys and values of `kept` tokens, summed over sequences and kv heads."""
    return 2 * kept * cache.keys.shape[-1] * cache.keys.dtype.itemsize


def decode_bytes(cache: LayerCache, sink: int, kept: int) -> float:
    """A whole attention: all codes once, and the kept tokens' keys and values once."""
    return code_bytes(cache, sink) + attention_bytes(cache, kept)


def weight_bytes(model: Llama) -> int:
    """Weights that one token reads: all, but of an embedding that is no output head a row, which is left out."""
    size = lambda weight: weight.size * weight.dtype.itemsize  # noqa: E731
    read = sum(size(weight) for weight in jax.tree.leaves(nnx.state(model)))
    return read if model.config.tie_embeddings else read - size(model.embed_tokens.weight.get_value())
