"""Synthetic queries and keys of attention heads; each kind has one more property of real ones than the kind before."""

import dataclasses

import numpy as np

KV_HEADS, GROUP = 2, 4
RANK = 16
LOGIT_DEVIATION = 3.0
ROPE_BASE = 500_000.0

KINDS = {
    "gaussian": "independent normal coordinates",
    "offset": "and means (of keys 3 coordinate deviations, in two outlier channels 30; of queries 1), and a sink",
    "rotary": "and rotary embedding (base 500000) of keys and queries, so that the mean drifts along the sequence",
    "low rank": "and nine tenths of the variance around the mean, before rotary embedding, in 16 directions",
}


@dataclasses.dataclass(frozen=True)
class Heads:
    """query [K,G,D] of the next token; prompt_queries [K,n,D], a sample; keys [K,T,D]; all float32."""

    query: np.ndarray
    prompt_queries: np.ndarray
    keys: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """Exact scaled logits, float64 [K,G,T]."""
        return np.einsum("kgd,ktd->kgt", self.query, self.keys, dtype=np.float64) / self.query.shape[-1] ** 0.5


def make_heads(kind: str, tokens: int, head_dim: int, seed: int, query_offset: float = 1.0) -> Heads:
    """Heads of the given kind. Queries are scaled so that logits deviate by 3 nats over the tokens.

    The sink is the first token: its key points along the queries, and holds about half of the mass. `query_offset` is
    the size of the queries' mean, in deviations of a coordinate.
    """
    rng = np.random.default_rng([list(KINDS).index(kind), seed])
    position = np.arange(tokens)
    prompt_position = position[:: max(tokens // 512, 1)]
    basis = rng.normal(size=(KV_HEADS, RANK, head_dim))
    heads = []
    for k in range(KV_HEADS):
        mean_key, mean_query = np.zeros((2, head_dim))
        if kind != "gaussian":
            mean_key, mean_query = 3 * rng.normal(size=head_dim), query_offset * rng.normal(size=head_dim)
            mean_key[rng.choice(head_dim, 2, replace=False)] *= 10
        around = low_rank_noise(basis[k], rng) if kind == "low rank" else lambda n: rng.normal(size=(n, head_dim))
        rotate = rotary if kind in ("rotary", "low rank") else lambda x, _: x
        heads.append(
            (
                rotate(mean_query + around(GROUP), np.full(GROUP, tokens)),
                rotate(mean_query + around(len(prompt_position)), prompt_position),
                rotate(mean_key + around(tokens), position),
            )
        )
    query, prompt_queries, keys = (np.stack(arrays) for arrays in zip(*heads, strict=True))
    for k in range(KV_HEADS):
        spread = (query[k] @ keys[k].T / head_dim**0.5).std(axis=1).mean()
        query[k] *= LOGIT_DEVIATION / spread
        prompt_queries[k] *= LOGIT_DEVIATION / spread
        if kind != "gaussian":
            rest = np.logaddexp.reduce(query[k] @ keys[k, 1:].T / head_dim**0.5, axis=1).mean()
            along = query[k].mean(axis=0)
            keys[k, 0] = rest * head_dim**0.5 * along / (along @ along)
    return Heads(*(x.astype(np.float32) for x in (query, prompt_queries, keys)))


def low_rank_noise(basis, rng):
    """Noise [n,D] with nine tenths of its variance in the rows of the basis."""

    def around(n):
        inside = rng.normal(size=(n, len(basis))) @ basis / len(basis) ** 0.5
        return 0.9**0.5 * inside + 0.1**0.5 * rng.normal(size=(n, basis.shape[1]))

    return around


def rotary(x, position):
    """Rotary embedding of x [n,D], dimension i paired with i + D / 2."""
    half = x.shape[1] // 2
    angle = position[:, None] * ROPE_BASE ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=1)
