"""Oracle: exact logits decide which tokens are attended. What any estimate of them could reach with the same rule.

    z_i = softmax_scale <q, k_i>;   Top-k keeps the k largest z, Top-p the fewest that hold p of softmax(z)

It is the upper bound of the literature's comparisons (oracle Top-k in Quest, arXiv 2406.10774, and Twilight, arXiv
2502.02770), and no method to use: scoring reads every key. With rule=TopK, sinks and window
are kept as in the other methods, which a pure Top-k would not do; the default, recent=1, keeps the new token alone.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rabitq_jax.selectors.budget import Rule, TopP
from rabitq_jax.selectors.selector import ScoringSelector, State, Step

if TYPE_CHECKING:
    from rabitq_jax.cache import LayerCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class OracleTopK(ScoringSelector):
    """Exact scores of every token; Top-k unless another rule is given."""

    def bytes_per_token(self, head_dim: int, itemsize: int) -> float:
        return head_dim * itemsize

    def score(self, query: jax.Array, state: State, cache: "LayerCache", step: Step) -> jax.Array:
        return step.softmax_scale * jnp.einsum(
            "bkgd,bktd->bkgt", query.astype(cache.keys.dtype), cache.keys,
            precision="highest", preferred_element_type=jnp.float32,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class OracleTopP(OracleTopK):
    """Exact scores of every token; Top-p unless another rule is given."""

    rule: Rule = TopP(top_p=0.95)
