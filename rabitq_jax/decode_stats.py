"""What a decode step of one layer attended and read."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadSizes:
    """Bytes of what a step reads of one kv head's cache.

    Attributes:
      row: of a key, and of a value.
      code: of a quantized token; 0 in a layer that attends densely.
      centroid: of the centroid of `tokens_per_centroid` quantized tokens.
      exact_keys_twice: for p over all tokens, keys of sinks and window are read once more.
      sink: first tokens that are exact.
      tail: of the mean value that stands for what is left out.
    """

    row: int
    code: int = 0
    centroid: int = 0
    tokens_per_centroid: int = 1
    exact_keys_twice: bool = False
    sink: int = 0
    tail: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStats:
    """What one decode step of one layer attended and read.

    Attributes:
      length: int32 [B], tokens in the cache, the new one included.
      quantized: int32 [B], those of them that have codes.
      kept: int32 [B,K], tokens attended by each kv head.
      read: int32 [B,K], tokens whose keys and values were read for that: those of a second round once more.
      scored: int32 [B,H], quantized tokens that each query head asked for.
      mass: float32 [B,H], share of the estimated mass in each query head's own tokens (of all tokens or of the scored
        ones: config.top_p_scope). For selections other than "plain": what the debiased estimates claim of it.
      verified: float32 [B,H], share of all attention in the tokens that the query head's kv head attends, as exact
        attention to them shows it: estimated without bias.
      bound: float32 [B,H], what that share is at least, with probability 1 - config.failure_rate.
      extended: bool [B,H], query heads that had a second round, because the bound of the first was below p.
      certified: bool [B,H], the bound is p or more. Where it is not, p may be held all the same: it is the claim that
        fails, and no round follows.
      The last four are None for config.selection "plain", which verifies nothing; 1, 1, False and True in a layer that
      attends densely.
      sizes: static.
      selector_bytes: float32 [B], all bytes that the layer's selector read; None in a layer without one.
    """

    length: jax.Array
    quantized: jax.Array
    kept: jax.Array
    read: jax.Array
    scored: jax.Array
    mass: jax.Array
    verified: jax.Array | None = None
    bound: jax.Array | None = None
    extended: jax.Array | None = None
    certified: jax.Array | None = None
    sizes: ReadSizes = dataclasses.field(metadata={"static": True})
    selector_bytes: jax.Array | None = None

    @property
    def bytes_read(self) -> jax.Array:
        """float32 [B], bytes of the cache that the step reads.

        Codes and centroids of the quantized tokens; keys and values of the attended ones; for p over all tokens, keys
        of sinks and window once more; and the tail's values. With a selector, what it says.
        """
        if self.selector_bytes is not None:
            return self.selector_bytes
        sizes, kv_heads = self.sizes, self.read.shape[1]
        quantized = self.quantized.astype(jnp.float32)
        centroids = jnp.ceil(quantized / sizes.tokens_per_centroid)
        of_a_head = quantized * sizes.code + centroids * sizes.centroid + sizes.tail
        if sizes.exact_keys_twice:
            exact = self.length - jnp.maximum(self.quantized - sizes.sink, 0)
            of_a_head += sizes.row * exact.astype(jnp.float32)
        # Term by term, so that the sums of many layers become one kernel, as a reduction would not.
        rows = functools.reduce(operator.add, [self.read[:, k].astype(jnp.float32) for k in range(kv_heads)])
        return kv_heads * of_a_head + 2 * sizes.row * rows

    @property
    def bytes_dense(self) -> jax.Array:
        """float32 [B], bytes that dense attention reads: keys and values of every token once."""
        return self.length.astype(jnp.float32) * (2 * self.read.shape[1] * self.sizes.row)
