"""The papers' rules in a few lines of float64 NumPy each: what a kv head attends, and what comes of it.

RULES gives the set of tokens that a kv head attends; OUTPUTS the output, where it is not attention to that set.
"""

import jax.numpy as jnp
import numpy as np

from tests.selector_cases import GROUP, KV_HEADS, SCALE, History, attend, history, largest, softmax


def union(scores, count: int, sink: int, recent: int, length: int, page: int = 1) -> set[int]:
    """Sinks, window, and the tokens in each query head's `count` best pages; scores [G,pages]."""
    stop = max(length - recent, 0) // page * page
    best = set().union(*(largest(head, count, sink // page, stop // page) for head in scores))
    tokens = {page * p + i for p in best for i in range(page)}
    return (tokens | set(range(sink)) | set(range(stop, length))) & set(range(length))


def fewest(weights, p: float, candidates) -> set[int]:
    """The fewest of the candidates that, with all others, hold p of one head's weights."""
    order = sorted(candidates, key=lambda i: -weights[i])
    mass, kept = weights.sum() - weights[order].sum(), set()
    for i in order:
        if mass >= p * weights.sum():
            break
        kept.add(i)
        mass += weights[i]
    return kept


def top_p(seen: History, scores, p: float, candidates, sink: int = 4, page: int = 1) -> set[int]:
    """Sinks, 8 last tokens, and of the candidates what Top-p keeps by scores [G,t], beside exact logits of those."""
    always = union(scores, 0, sink, 8, len(seen.keys), page)
    kept = set(always)
    for head, (estimate, logits) in enumerate(zip(scores, seen.logits, strict=True)):
        chosen = sorted(candidates[head] - always)
        weights = np.zeros(len(logits))
        weights[chosen], weights[sorted(always)] = np.exp(estimate[chosen]), np.exp(logits[sorted(always)])
        kept |= fewest(weights, p, chosen)
    return kept


def quantized(x, bits: int):
    """Rows [...,n] on 2^bits levels between their least and largest number, kept in float16."""
    zero = x.min(axis=-1, keepdims=True).astype(np.float16).astype(float)
    scale = ((x.max(axis=-1, keepdims=True) - zero) / (2**bits - 1)).astype(np.float16).astype(float)
    return zero + scale * np.clip(np.round((x - zero) / np.where(scale == 0, 1, scale)), 0, 2**bits - 1)


def attention_weights(seen: History, query: int, keys=None):
    """[G,t] of the query of one token."""
    return softmax(seen.queries[query] @ seen.keys[: query + 1].T * SCALE)


def oracle_top_k(seen, ran, b, k):
    return union(seen.logits, 28, 4, 8, len(seen.keys))


def oracle_top_p(seen, ran, b, k):
    return top_p(seen, seen.logits, 0.7, [set(range(len(seen.keys)))] * GROUP)


def oracle_both(seen, ran, b, k):
    best = [largest(logits, 28, 4, max(len(logits) - 8, 0)) for logits in seen.logits]
    return top_p(seen, seen.logits, 0.7, best)


def streaming_llm(seen, ran, b, k):
    return {i for i in range(len(seen.keys)) if i < 4 or i >= len(seen.keys) - 24}


def page_bounds(seen):
    pages = [seen.keys[i : i + 8] for i in range(0, len(seen.keys), 8)]
    bounds = [np.maximum(seen.query * page.min(axis=0), seen.query * page.max(axis=0)).sum(axis=1) for page in pages]
    assert all(np.all(top + 1e-9 >= (seen.query @ page.T).max(axis=1)) for top, page in zip(bounds, pages, strict=True))
    return np.stack(bounds, axis=1)


def quest(seen, ran, b, k):
    return union(page_bounds(seen), 3, 8, 8, len(seen.keys), page=8)


def quest_top_p(seen, ran, b, k):
    """Each token of a page has the page's bound for its estimate."""
    tokens = len(seen.keys)
    return top_p(
        seen, np.repeat(page_bounds(seen) * SCALE, 8, axis=1)[:, :tokens], 0.7, [set(range(tokens))] * GROUP, 8, 8
    )


def h2o(seen, ran, b, k):
    length = len(seen.keys)
    received = np.zeros(length)
    for token in range(seen.prompt):
        received[: token + 1] += attention_weights(seen, token).sum(axis=0)
    kept = largest(received, 20, 0, max(seen.prompt - 10, 0)) | set(range(max(seen.prompt - 10, 0), seen.prompt))
    for token in range(seen.prompt, length):
        kept.add(token)
        if len(kept) > 30:
            kept.remove(min((i for i in kept if i <= token - 10), key=lambda i: received[i]))
        listed = sorted(kept)
        received[listed] += softmax(seen.queries[token] @ seen.keys[listed].T * SCALE).sum(axis=0)
    return kept


def snapkv(seen, ran, b, k, count=22):
    prefix = max(seen.prompt - 8, 0)
    votes = sum(attention_weights(seen, token).sum(axis=0)[:prefix] for token in range(prefix, seen.prompt))
    pooled = np.array([votes[max(i - 1, 0) : i + 2].max() for i in range(prefix)])
    return largest(pooled, count, 0, prefix) | set(range(prefix, len(seen.keys)))


def pyramidkv(seen, ran, b, k):
    return snapkv(seen, ran, b, k, count=int(22 / 4))


def sparq_scores(seen):
    size = np.abs(seen.query)
    channels = np.argsort(-size.sum(axis=0))[:8]
    share = size[:, channels].sum(axis=1) / size.sum(axis=1)
    return seen.query[:, channels] @ seen.keys[:, channels].T * SCALE / np.sqrt(share)[:, None]


def sparq(seen, ran, b, k):
    return union(sparq_scores(seen), 28, 4, 8, len(seen.keys))


def sparq_output(seen, kept, ran, b, k):
    alpha = softmax(sparq_scores(seen))[:, sorted(kept)].sum(axis=1, keepdims=True)
    return alpha * attend(seen, kept) + (1 - alpha) * seen.values.mean(axis=0)


def double_sparsity(seen, ran, b, k):
    queries = seen.queries[max(seen.prompt - 32, 0) : seen.prompt]
    outliers = np.abs(queries).sum(axis=(0, 1)) * np.abs(seen.keys[: seen.prompt]).sum(axis=0)
    channels = np.sort(np.argsort(-outliers)[:8])
    labels = quantized(seen.keys[:, channels], 4)
    return union(seen.query[:, channels] @ labels.T, 28, 4, 8, len(seen.keys))


def twilight(seen, ran, b, k):
    through = union(page_bounds(seen), 9, 0, 1, len(seen.keys), page=8)
    return top_p(seen, seen.query @ quantized(seen.keys, 4).T * SCALE, 0.7, [through] * GROUP)


def twilight_full(seen, ran, b, k):
    through = set(range(len(seen.keys)))
    return top_p(seen, seen.query @ quantized(seen.keys, 4).T * SCALE, 0.7, [through] * GROUP)


def hashes(seen, ran):
    """Signs of all keys [t,L,bits] and queries [G,L,bits], and the centred keys."""
    projections = np.asarray(ran.cache.state.projections, np.float64)
    centred = seen.keys - seen.keys[: seen.prompt].mean(axis=0)
    return [np.einsum("nd,lkd->nlk", x, projections) > 0 for x in (centred, seen.query)], centred


def magicpig_sample(seen, ran):
    (keys, queries), _ = hashes(seen, ran)
    shared = np.all(queries[:, None] == keys, axis=-1).sum(axis=-1)
    sampled = shared >= 2
    sampled[:, [i for i in range(len(seen.keys)) if i < 4 or i >= len(seen.keys) - 8]] = True
    return sampled


def magicpig(seen, ran, b, k):
    return set(np.flatnonzero(magicpig_sample(seen, ran).any(axis=0)).tolist())


def magicpig_output(seen, kept, ran, b, k):
    _, centred = hashes(seen, ran)
    norms = np.linalg.norm(seen.query, axis=1)[:, None] * np.linalg.norm(centred, axis=1)
    same = (1 - np.arccos(seen.query @ centred.T / norms) / np.pi) ** 6
    chance = 1 - (1 - same) ** 20 - 20 * same * (1 - same) ** 19
    chance[:, [i for i in range(len(seen.keys)) if i < 4 or i >= len(seen.keys) - 8]] = 1
    weights = magicpig_sample(seen, ran) * np.exp(seen.logits) / chance
    return weights @ seen.values / weights.sum(axis=1, keepdims=True)


def pqcache(seen, ran, b, k):
    scores = np.zeros((GROUP, len(seen.keys)))
    for part in range(4):
        cut = slice(8 * part, 8 * part + 8)
        points, prompt = seen.keys[:, cut], seen.keys[: seen.prompt, cut]
        centroids = prompt[np.arange(16) * seen.prompt // 16]
        nearest = lambda x, c: ((x[:, None] - c) ** 2).sum(axis=-1).argmin(axis=1)  # noqa: E731
        for _ in range(10):
            code = nearest(prompt, centroids)
            members = [prompt[code == c] for c in range(16)]
            centroids = np.stack([m.mean(axis=0) if len(m) else c for m, c in zip(members, centroids, strict=True)])
        scores += seen.query[:, cut] @ centroids[nearest(points, centroids)].T
    return union(scores, 28, 4, 8, len(seen.keys))


def duo_attention(seen, ran, b, k):
    def outside(head):
        one = history(len(seen.keys) - seen.prompt - 1, b, head)
        far = slice(4, max(seen.prompt - 8, 4))
        return sum(attention_weights(one, t)[:, far].sum() for t in range(max(seen.prompt - 32, 0), seen.prompt))

    # With a prompt of 9 tokens no head has anything outside, and the first one retrieves.
    retrieves = max(range(KV_HEADS), key=outside) == k
    return {i for i in range(len(seen.keys)) if retrieves or i < 4 or i >= len(seen.keys) - 8}


def everything(seen, ran, b, k):
    return set(range(len(seen.keys)))


def kivi_output(seen, kept, ran, b, k):
    length = len(seen.keys)
    keys, values = seen.keys.copy(), seen.values.copy()
    for start in range(0, length // 32 * 32, 16):
        keys[start : start + 16] = quantized(keys[start : start + 16].T, 2).T
    old = max(length - 32, 0)
    values[:old] = quantized(values[:old].reshape(old, 2, 16), 2).reshape(old, 32)
    return softmax(seen.query @ keys.T * SCALE) @ values


def grid_point(x, bits: int):
    """Of the points with coordinates in {1/2, 3/2, ..., 2^(bits - 1) - 1/2} and x's signs, the one of largest cosine.

    It is floor(t |x|) + 1/2 for some t, and there are no others than at, just past, and before all those t where a
    coordinate is a whole number.
    """
    size, half = np.abs(x), 2 ** (bits - 1)
    turns = np.concatenate([[0.0], (np.arange(1, half) / size[:, None]).ravel() * (1 + 1e-12)])
    grid = np.minimum(np.floor(turns[:, None] * size), half - 1) + 0.5
    return np.sign(x) * grid[np.argmax(grid @ size / np.linalg.norm(grid, axis=1))]


def extended_rabitq(bits: int, centred: bool):
    def rule(seen, ran, b, k):
        rotation = np.asarray(ran.cache.state.rotation, np.float64)
        centroid = seen.keys[: seen.prompt].mean(axis=0) * centred
        x = (seen.keys - centroid) @ rotation.T
        points = np.stack([grid_point(row, bits) for row in x])
        scale = ((x * x).sum(axis=1) / (points * x).sum(axis=1)).astype(jnp.bfloat16).astype(float)
        return union((seen.query @ rotation.T) @ points.T * scale, 28, 4, 8, len(seen.keys))

    return rule


RULES = {
    "full": everything,
    "oracle-top-k": oracle_top_k,
    "oracle-top-p": oracle_top_p,
    "oracle-both": oracle_both,
    "streaming-llm": streaming_llm,
    "quest": quest,
    "quest-top-p": quest_top_p,
    "h2o": h2o,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "sparq": sparq,
    "double-sparsity": double_sparsity,
    "tidal-decode": oracle_top_k,
    "twilight": twilight,
    "twilight-full": twilight_full,
    "magicpig": magicpig,
    "pqcache": pqcache,
    "duo-attention": duo_attention,
    "kivi": everything,
    "extended-rabitq-1-prompt": extended_rabitq(1, True),
    "extended-rabitq-1-none": extended_rabitq(1, False),
    "extended-rabitq-2-prompt": extended_rabitq(2, True),
    "extended-rabitq-4-prompt": extended_rabitq(4, True),
}
OUTPUTS = {"sparq": sparq_output, "magicpig": magicpig_output, "kivi": kivi_output}
