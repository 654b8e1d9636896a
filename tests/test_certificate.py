"""The equations of docs/theory.md, one by one, against simulation and float64 NumPy; and what a step makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.exact import attended
from rabitq_jax import RaBitQConfig, attention, noisy_scores, thresholds
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.certificate import Certificate, found_terms
from rabitq_jax.gathered_attention import gathered_attention
from rabitq_jax.threshold_selection import keep_by_thresholds
from rabitq_jax.verified_attention import verified_attention
from tests.test_attention import HEAD_DIM, HEADS, KV_HEADS, PROMPT, SMALL, decode, dense, filled_cache, prefill, prompt


@pytest.mark.parametrize("spread", ["normal", "heavy-tailed", "two values"])
def test_debiased_mass_needs_no_prior(spread):
    """Equation (3): the weight below a threshold is the true mass below it, on average, however logits are spread.

    Deviations differ from token to token. 4 standard errors of a mean over 400 roundings of 500 tokens.
    """
    rng = np.random.default_rng(0)
    true = {"normal": rng.normal(size=500), "heavy-tailed": rng.standard_t(3, size=500).clip(-8, 8)}
    true = true | {"two values": np.where(rng.random(500) < 0.9, -2.0, 2.0)}
    s, sd = true[spread], rng.uniform(0.5, 1.5, size=500)
    z = s + sd * rng.normal(size=(4000, 500))
    for t in (-2.0, 0.0, 2.0):
        mass = np.sum(np.exp(s) * (z + sd**2 / 2 < t), axis=1)
        weight = np.sum(np.exp(z - sd**2 / 2) * (z - sd**2 / 2 < t), axis=1)
        difference = weight - mass
        assert abs(difference.mean()) < 4 * difference.std() / len(z) ** 0.5
        # What Jensen's correction alone claims is far off.
        jensen = np.sum(np.exp(z - sd**2 / 2) * (z + sd**2 / 2 < t), axis=1)
        assert abs((jensen - mass).mean()) > 10 * (jensen - mass).std() / len(z) ** 0.5 or t == 2.0


def test_rest_is_unbiased_and_its_variance_too():
    """Equations (4) and (5), over 20,000 draws of the noise of 300 tokens with thresholds of their own."""
    rng = np.random.default_rng(1)
    s, sd = 1.5 * rng.normal(size=300), rng.uniform(0.5, 2.0, size=300)
    threshold = 1.0 - sd**2 / 2 - 0.3 * sd
    z = s + sd * rng.normal(size=(20000, 300))
    found = z >= threshold
    arrays = (jnp.asarray(x, jnp.float32) for x in (s, z, sd, threshold))
    terms = found_terms(*arrays, jnp.float32(1.0), jnp.float32(0.5))
    missed, variance, returned = (
        np.broadcast_to(np.asarray(x, np.float64), z.shape) for x in (terms.missed, terms.variance, terms.returned)
    )
    scale = np.exp(0.5)
    rest = np.sum(np.where(found, scale * missed, np.exp(z - sd**2 / 2)), axis=1)
    # What was not found, without a look at it: all below the threshold of the bulk, less what was found there.
    weight = np.exp(z - sd**2 / 2)
    below = np.sum(np.where(z - sd**2 / 2 < 1.0, weight, 0), axis=1)
    rest_again = below + scale * np.sum(np.where(found, missed - returned, 0), axis=1)
    np.testing.assert_allclose(rest_again, rest, rtol=1e-3)
    error = rest - np.sum(np.where(found, 0, np.exp(s)), axis=1)
    assert abs(error.mean()) < 4 * error.std() / len(z) ** 0.5
    predicted = np.sum(np.where(found, scale**2 * variance, 0), axis=1)
    difference = error**2 - predicted
    assert abs(difference.mean()) < 4 * difference.std() / len(z) ** 0.5
    assert abs(error.var() / predicted.mean() - 1) < 0.1


def test_found_terms_are_finite_and_vanish_far_above_the_threshold():
    true = jnp.array([-50.0, 0.0, 30.0, 90.0, 500.0])
    for sd in (0.01, 1.0, 6.0):
        terms = found_terms(true, true, sd, jnp.float32(0.0), jnp.float32(0.0), jnp.float32(5.0))
        assert all(np.all(np.isfinite(term)) for term in jax.tree.leaves(terms))
        assert all(term[-1] == 0 for term in jax.tree.leaves(dataclasses.replace(terms, number=0 * true)))


def test_shift_is_that_of_the_found_errors():
    """A shift that all errors have in common shows in the score of the found ones; the information is its curvature."""
    rng = np.random.default_rng(2)
    s, sd = rng.normal(size=100_000), 1.5
    for shift in (-0.3, 0.0, 0.3):
        z = s + sd * (shift + rng.normal(size=s.size))
        found = z >= 0.5
        arrays = (jnp.asarray(x[found], jnp.float32) for x in (s, z))
        terms = found_terms(*arrays, sd, 0.5, 0.5, 0.0)
        information, score = (np.asarray(x, np.float64) for x in (terms.information, terms.score))
        assert abs(score.sum() / information.sum() - shift) < 0.05


def noisy_logits(rng, *, kv_heads=1, group=1, tokens=512, quantized=384, sink=8):
    heads = (1, kv_heads, group)
    return thresholds.NoisyLogits(
        scores=jnp.asarray(3 * rng.normal(size=(*heads, tokens)), jnp.float32),
        noise=jnp.asarray(rng.uniform(0.5, 1.5, size=heads), jnp.float32),
        scale=jnp.asarray(rng.uniform(0.8, 1.2, size=(1, kv_heads, tokens)), jnp.bfloat16),
        quantized=jnp.array([quantized]),
        sink=sink,
    )


def one_head(noisy):
    """z and sd of the scored tokens of the only head, float64."""
    part = slice(noisy.sink, int(noisy.quantized[0]))
    z, sd = (np.asarray(x, np.float64)[0, 0, 0, part] for x in (noisy.scores, noisy.deviation))
    return z, sd


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.99])
@pytest.mark.parametrize("deviations", [0.0, 3.0])
@pytest.mark.parametrize("level", [0.0, 1.7])
def test_bulk_threshold_is_the_highest_that_fits(top_p, deviations, level):
    """Against sums over sorted tokens; the grid is 1/8 nat wide."""
    noisy = noisy_logits(np.random.default_rng(3))
    exact_lse = jnp.full((1, 1, 1), 4.0)
    mass = thresholds.measure_masses(noisy, exact_lse)
    z, sd = one_head(noisy)
    a = z - sd**2 / 2
    w = np.exp(a)
    total = w.sum() + np.exp(4.0)
    np.testing.assert_allclose(mass.total[0, 0, 0] * np.exp(mass.peak[0, 0, 0]), total, rtol=1e-5)
    budget = (1 - top_p) * mass.total
    bulk, below = thresholds.find_bulk(noisy, mass, budget, jnp.full_like(budget, level), deviations)

    def bound(t):
        under = w[a < t]
        first = under.sum()
        return max(level * first, (1 + 0.085 * deviations) * first + deviations * np.sqrt(np.sum(under**2)))

    t = float(bulk[0, 0, 0])
    assert t in np.float32(a.max()) - np.arange(1, 1025, dtype=np.float32) / 8 or t == -np.inf
    assert bound(t) <= (1 - top_p) * total * (1 + 1e-5)
    assert bound(t + 1 / 8 + 1e-4) > (1 - top_p) * total * (1 - 1e-5)
    np.testing.assert_allclose(below[0, 0, 0] * np.exp(mass.peak[0, 0, 0]), w[a < t].sum(), rtol=1e-4)


def test_no_budget_keeps_everything_that_has_weight():
    noisy = noisy_logits(np.random.default_rng(4))
    mass = thresholds.measure_masses(noisy, jnp.zeros((1, 1, 1)))
    nothing = 0 * mass.total
    bulk, below = thresholds.find_bulk(noisy, mass, nothing, nothing, 0.0)
    z, sd = one_head(noisy)
    assert bulk[0, 0, 0] <= np.min(z - sd**2 / 2) and below[0, 0, 0] == 0
    bulk, below = thresholds.find_bulk(noisy, mass, nothing - 1, nothing, 0.0)
    assert bulk[0, 0, 0] == -np.inf and below[0, 0, 0] == 0


def test_second_thresholds_come_with_the_mass_below_them():
    """C1 at the lower threshold in heads that are short, at the first one in the others."""
    noisy = noisy_logits(np.random.default_rng(7), kv_heads=2, group=2)
    mass = thresholds.measure_masses(noisy, jnp.zeros((1, 2, 2)))
    first, below = thresholds.certified_thresholds(noisy, mass, top_p=0.8, failure_rate=1e-2)
    known = Certificate(
        attended=0.6 * mass.total, own=0.6 * mass.total, rest=3 * below, bulk=4 * below, verified=below, bound=below
    )
    short = jnp.array([[[True, False], [False, True]]])
    find = functools.partial(thresholds.find_bulk, noisy, mass)
    lower, below_lower = thresholds.extended_thresholds(find, mass, first, below, known, short, top_p=0.8)
    assert np.all(np.asarray(lower.bulk < first.bulk) == short) and np.all(lower.single <= first.single)
    z, sd, peak = (np.asarray(x, np.float64) for x in (noisy.scores, noisy.deviation, mass.peak))
    for at in np.ndindex(1, 2, 2):
        part = slice(8, 384)
        debiased = z[at][part] - sd[at][part] ** 2 / 2
        weight = np.exp(debiased - peak[at])[debiased < float(lower.bulk[at])]
        np.testing.assert_allclose(below_lower[at], weight.sum(), rtol=1e-4, atol=1e-6)


def test_thresholds_keep_what_they_say():
    """Both rules, the union over a group, sinks, window, and what is not finite."""
    noisy = noisy_logits(np.random.default_rng(5), kv_heads=2, group=3)
    scores = noisy.scores.at[0, 0, 1, 100].set(jnp.nan).at[0, 1, 2, 200].set(-jnp.inf)
    noisy = dataclasses.replace(noisy, scores=scores)
    mass = thresholds.measure_masses(noisy, jnp.zeros((1, 2, 3)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(mass))
    bulk = jnp.array([[[2.0, 3.0, 4.0], [1.0, 2.0, jnp.inf]]])
    limits = thresholds.Thresholds(bulk=bulk, single=bulk + 1, deviations=1.0)
    indices, counts = keep_by_thresholds(noisy, limits, jnp.array([430]))
    z, sd = (np.asarray(x, np.float64) for x in (noisy.scores, noisy.deviation))
    for k in range(2):
        union = np.zeros(512, bool)
        for g in range(3):
            t = np.asarray(bulk)[0, k, g]
            by_bulk, by_single = (z[0, k, g] + x for x in (sd[0, k, g] ** 2 / 2, sd[0, k, g]))
            keep = ~((by_bulk < t) & (by_single < t + 1)) | ~np.isfinite(z[0, k, g])
            keep[:8] = keep[384:] = False
            union |= keep
        union[:8] = union[384:430] = True
        assert indices[0, k, : counts[0, k]].tolist() == np.flatnonzero(union).tolist()


def test_verified_attention_is_attention_and_sums_over_own_tokens():
    """Output as `gathered_attention`; masses and sums in float64 NumPy over each query head's own tokens alone."""
    rng = np.random.default_rng(6)
    noisy = noisy_logits(rng, kv_heads=2, group=3, tokens=512)
    query, keys, values = (jnp.asarray(rng.normal(size=(1, 2, n, 16)), jnp.float32) for n in (3, 512, 512))
    s = 0.5 * np.einsum("kgd,ktd->kgt", np.asarray(query[0], np.float64), np.asarray(keys[0], np.float64))
    scores = s + np.asarray(noisy.deviation[0]) * rng.normal(size=s.shape)
    noisy = dataclasses.replace(noisy, scores=jnp.asarray(scores[None], jnp.float32))
    mass = thresholds.measure_masses(noisy, jnp.full((1, 2, 3), 2.0))
    bulk = jnp.asarray(rng.uniform(0, 4, size=(1, 2, 3)), jnp.float32)
    limits = thresholds.Thresholds(bulk=bulk, single=bulk + 1.5, deviations=1.0)
    lists = indices, counts = keep_by_thresholds(noisy, limits, jnp.array([400]))
    out, attended, own_mass, found = verified_attention(
        query, keys, values, *lists, noisy, mass, limits, softmax_scale=0.5
    )
    want = gathered_attention(query, keys, values, *lists, softmax_scale=0.5, implementation="xla")
    np.testing.assert_allclose(out, want, atol=1e-6)
    z, sd = (np.asarray(x, np.float64)[0] for x in (noisy.scores, noisy.deviation))
    position = np.arange(512)
    exact = (position < 8) | ((position >= 384) & (position < 400))
    foreign = 0
    for k, g in np.ndindex(2, 3):
        t = float(bulk[0, k, g]) + np.minimum(-(sd[k, g] ** 2) / 2, 1.5 - sd[k, g])
        own = (z[k, g] >= t) & (position >= 8) & (position < 384)
        union = np.asarray(indices[0, k, : counts[0, k]])
        foreign += len(union) - np.sum(own | exact)
        weights = np.exp(s[k, g])
        unit = np.exp(float(mass.peak[0, k, g]))
        np.testing.assert_allclose(attended[0, k, g], weights[union].sum() / unit, rtol=1e-5)
        np.testing.assert_allclose(own_mass[0, k, g], weights[own | exact].sum() / unit, rtol=1e-5)
        tau = ((t - s[k, g]) / sd[k, g])[own]
        h0, h1, h2 = (norm.cdf(tau - j * sd[k, g][own]) / norm.cdf(-tau) for j in range(3))
        e, peak = weights[own], float(mass.peak[0, k, g])
        missed = np.sum(e * (h0 - h1)) / np.exp(peak)
        variance = np.sum(e**2 * ((h0 - h1) ** 2 + h0 - 2 * h1 + np.exp(sd[k, g][own] ** 2) * h2)) / np.exp(2 * peak)
        np.testing.assert_allclose(found.missed[0, k, g], missed, rtol=1e-3)
        np.testing.assert_allclose(found.variance[0, k, g], variance, rtol=1e-3)
        debiased = z[k, g] - sd[k, g] ** 2 / 2
        returned = np.sum(np.exp(debiased - peak)[own & (debiased < float(bulk[0, k, g]))])
        np.testing.assert_allclose(found.returned[0, k, g], returned, rtol=1e-3)
        assert found.number[0, k, g] == own.sum()
    assert foreign > 20


CONFIGS = [dict(selection="debiased"), dict(selection="certified"), dict(selection="certified", tail="mean")]


@pytest.mark.parametrize("choices", CONFIGS, ids=str)
def test_step_at_p_one_is_dense_attention(choices):
    config = RaBitQConfig(top_p=1.0, **choices, **SMALL)
    token = [x[:, 0] for x in prompt(seed=3, tokens=1)]
    _, key, value = prompt()
    out, _, stats = decode(*token, filled_cache(config), config, prng_key=jax.random.key(0))
    for b, held in enumerate(PROMPT):
        keys = np.concatenate([key[b, :held], token[1][b : b + 1]])
        values = np.concatenate([value[b, :held], token[2][b : b + 1]])
        np.testing.assert_allclose(out[b], dense(token[0][b], keys, values), atol=1e-5)
    assert np.all(stats.verified == 1) and np.all(stats.bound == 1)
    assert np.all(stats.certified) and not np.any(stats.extended)
    np.testing.assert_array_equal(stats.kept, PROMPT[:, None] + 1 + np.zeros((1, KV_HEADS), int))


@functools.partial(jax.jit, static_argnames=("config",))
def step_and_list(token, cache, config):
    """A step's output and stats, and which tokens it attends, bool [B,K,T]."""
    key = jax.random.key(0)
    cache = attention.append(cache, *(x[:, None] for x in token[1:]), jnp.ones_like(cache.length))
    query = token[0].reshape(len(token[0]), KV_HEADS, -1, HEAD_DIM)
    out, selection, stats = attention.attend_selected(query, cache, config, HEAD_DIM**-0.5, key)
    return out, attended(selection.indices, selection.counts), stats, cache


@pytest.mark.parametrize("tail", ["drop", "mean"])
def test_output_is_attention_to_the_list_and_the_tail(tail):
    """The tail: what is verified to be missing, at the mean value of the scored tokens."""
    config = RaBitQConfig(top_p=0.5, selection="debiased", tail=tail, **SMALL)
    token = [jnp.asarray(x[:, 0]) for x in prompt(seed=3, tokens=1)]
    out, chosen, stats, cache = step_and_list(token, filled_cache(config), config)
    assert np.all(np.asarray(stats.verified)[0] < 1)
    for b, k in np.ndindex(3, KV_HEADS):
        index = np.flatnonzero(np.asarray(chosen)[b, k])
        keys, values = (np.asarray(x, np.float64)[b, k] for x in (cache.keys, cache.values))
        scored = values[SMALL["sink"] : max(int(cache.quantized[b]), SMALL["sink"])]
        mean = scored.mean(axis=0) if len(scored) else np.zeros(HEAD_DIM)
        for g in range(HEADS // KV_HEADS):
            query = np.asarray(token[0], np.float64)[b, k * 3 + g]
            weights = np.exp(keys[index] @ query / HEAD_DIM**0.5)
            want = weights @ values[index] / weights.sum()
            if tail == "mean":
                share = float(stats.verified[b, k * 3 + g])
                want = share * want + (1 - share) * mean
            np.testing.assert_allclose(out[b, k, g], want, atol=1e-5)


def test_tail_values_are_those_of_the_scored_tokens():
    """Over a ragged prompt, 100 decode steps and a second prompt; and where codes are added to a dense cache."""
    config = RaBitQConfig(selection="debiased", tail="mean", dense_layers=0, **SMALL)
    cache = filled_cache(config)
    tokens = [x.swapaxes(0, 1) for x in prompt(seed=3, tokens=100)]

    def check(cache):
        for b in range(3):
            scored = np.asarray(cache.values, np.float64)[b, :, SMALL["sink"] : int(cache.quantized[b])]
            np.testing.assert_allclose(cache.scored_values[b], scored.sum(axis=1), atol=1e-4)

    check(cache)

    @jax.jit
    def run(cache):
        step = lambda cache, token: (attention.decode(*token, cache, config, prng_key=jax.random.key(0))[1], None)  # noqa: E731
        return jax.lax.scan(step, cache, tokens)[0]

    cache = run(cache)
    check(cache)
    _, cache = prefill(*prompt(seed=9, tokens=70), cache, config)
    assert cache.quantized.tolist() == config.quantized_length(PROMPT + 170).tolist()
    check(cache)
    plain = attention.Cache(layers=(filled_cache(None),), rotation_seed=jnp.uint32(0))
    added = jax.jit(attention.add_codes, static_argnames="config")(plain, config=config).layers[0]
    np.testing.assert_allclose(added.scored_values, filled_cache(config).scored_values, atol=1e-5)


@functools.cache
def extension_case(size):
    """A configuration, a cache of two kv heads, and queries [1,2,2,64] whose logits deviate by `size` nats."""
    rng = np.random.default_rng(8)
    config = RaBitQConfig(top_p=0.9, selection="certified", failure_rate=1e-2, **SMALL)
    cache = init_layer_cache(1, 512, 2, 64, config, dtype=jnp.float32)
    keys = jnp.asarray(rng.normal(size=(1, 2, 512, 64)), jnp.float32)
    cache = dataclasses.replace(cache, keys=keys, values=keys, length=jnp.array([500]))
    cache = jax.jit(attention.build_codes, static_argnames="config")(cache, config=config)
    query = size * jnp.asarray(rng.normal(size=(1, 2, 2, 64)), jnp.float32)
    return config, cache, query


def attend(config, cache, query):
    """A new program each time: the tests below change what it is made of."""
    step = jax.jit(lambda query, cache, key: attention.attend_selected(query, cache, config, 64**-0.5, key)[1:])
    return step(query, cache, jax.random.key(0))


def make_scores_low(monkeypatch):
    """The first kv head's estimates are 4 nats low, but for those of the 60 best tokens: nothing warns of it before
    tokens are attended."""
    true_scores = noisy_scores.proxy_scores

    def low_scores(*args, **kwargs):
        scores = true_scores(*args, **kwargs)
        rank = jnp.argsort(jnp.argsort(scores[0, 0], axis=-1), axis=-1)
        return scores.at[0, 0].add(jnp.where(rank < 452, -4.0, 0.0))

    monkeypatch.setattr(noisy_scores, "proxy_scores", low_scores)


def test_extension_is_for_heads_that_are_short(monkeypatch):
    """One more round, in their kv head alone, with lower thresholds; what it reads is counted."""
    config, cache, query = extension_case(0.8)
    honest, before = attend(config, cache, query)
    make_scores_low(monkeypatch)
    selection, stats = attend(config, cache, query)
    extended = np.asarray(stats.extended).reshape(2, 2)
    assert not np.any(before.extended) and np.any(extended[0]) and not np.any(extended[1])
    assert selection.counts[0, 1] == honest.counts[0, 1]
    row = 2 * 64 * 4
    read_once = float(before.bytes_read[0]) - row * float(before.kept.sum())
    assert float(stats.bytes_read[0]) - read_once > row * float(stats.kept.sum())
    monkeypatch.setattr(noisy_scores, "extended_thresholds", lambda find, mass, first, below, *_, **__: (first, below))
    first_round, still = attend(config, cache, query)
    assert first_round.counts[0, 0] < selection.counts[0, 0]
    # What is short after all rounds is said.
    np.testing.assert_array_equal(still.certified, still.bound >= config.top_p)
    assert not np.all(still.certified) and np.all(still.extended == stats.extended)


def test_debiased_selection_says_that_it_promises_nothing():
    config, cache, query = extension_case(2.5)
    _, stats = attend(dataclasses.replace(config, selection="debiased"), cache, query)
    assert not np.all(stats.certified) and not np.any(stats.extended)
    assert np.all(stats.bound < stats.verified) and np.all(stats.bound > 0)


@pytest.mark.parametrize("place", ["query", "quantized key", "scored value"])
def test_what_is_not_finite_shows_in_the_output(place):
    for bad in (np.nan, np.inf):
        assert finite_with(place, bad) == [True, False, True]


def finite_with(place, bad):
    config = RaBitQConfig(top_p=0.3, selection="certified", tail="mean", **SMALL)
    query, key, value = prompt()
    token = [x[:, 0] for x in prompt(seed=3, tokens=1)]
    if place == "query":
        token[0][1, 2, 3] = bad
    else:
        {"quantized key": key, "scored value": value}[place][1, 20, 0, 3] = bad
    cache = init_layer_cache(3, 512, KV_HEADS, HEAD_DIM, config, dtype=jnp.float32)
    _, cache = prefill(query, key, value, cache, config, new_tokens=PROMPT)
    out, _, _ = decode(*token, cache, config, prng_key=jax.random.key(0))
    return np.isfinite(out).all(axis=(1, 2)).tolist()


def test_plain_selection_verifies_nothing():
    config = RaBitQConfig(**SMALL)
    token = [x[:, 0] for x in prompt(seed=3, tokens=1)]
    _, _, stats = decode(*token, filled_cache(config), config, prng_key=jax.random.key(0))
    assert stats.verified is stats.bound is stats.extended is stats.certified is None


def test_a_selection_that_verifies_does_not_replace_the_kernels_that_were_named():
    config = RaBitQConfig(selection="debiased", select="mosaic", **SMALL)
    token = [x[:, 0] for x in prompt(seed=3, tokens=1)]
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        attention.decode(*token, filled_cache(config), config, prng_key=jax.random.key(0))
