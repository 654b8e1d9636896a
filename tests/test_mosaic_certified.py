"""Scores with noise on Hopper: weights of bins, limits, lists and verified attention, in an emulator and on the GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.exact import exact_logits
from benchmarks.shapes import Shape
from pallas_kernels import mosaic_certified, mosaic_compact, mosaic_found
from pallas_kernels.mosaic_bins import BINS, LARGEST_DEVIATION, MASS_UNIT
from pallas_kernels.mosaic_certified_threshold import SPREAD
from pallas_kernels.mosaic_rules import BOUND
from pallas_kernels.verified_attention import verified_attention_of_bins
from rabitq_jax import RaBitQConfig, attention, selection
from rabitq_jax import thresholds as thresholds_module
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.certificate import certify
from rabitq_jax.noisy_bins import NoisyBins, _Limits, find_bulk
from rabitq_jax.noisy_scores import NoisyScores
from rabitq_jax.scores import proxy_scores_reference
from rabitq_jax.thresholds import LEAST_SINGLE, SHARED, confidence, extended_thresholds, left_out
from rabitq_jax.verified_attention import CONSTANTS, masses
from tests.test_lowering import kernel_text
from tests.test_mosaic_kernels import FIRST, emulate, inputs, padded, prepared, ranges, zeros

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("quick_compilation")]
K = confidence(1e-3)


def rule_of(top_p, certified):
    return mosaic_certified.Rule(
        left_out=left_out(top_p, certified=certified),
        deviations=K,
        certified=certified,
        shared=SHARED,
        least_single=LEAST_SINGLE,
    )


def noise_of(shape, largest):
    """Deviations up to 2 `largest`, since scales go up to 2."""
    size = (shape.batch, shape.kv_heads, shape.group)
    return jnp.asarray(np.random.default_rng(1).uniform(0.3, largest, size), jnp.float32)


def spreads_of(state, heads):
    """Sums of e^(sd^2 / 2) over the tokens of each bin, less for those below its upper edge: float32 [B,K,H,256]."""
    words = state[..., : heads * 2 * BINS].reshape(*state.shape[:2], heads, BINS, 2)
    low, high = (jax.lax.bitcast_convert_type(words[..., i], jnp.uint32).astype(jnp.float32) for i in range(2))
    return (low + 2.0**32 * high) * MASS_UNIT


def select(shape, arguments, noise, base, exact_lse, quantized, length, rule):
    levels, bits, gain, scale, bias, bias_gain, shift = arguments
    return mosaic_certified.score_and_select(
        *prepared(levels, gain, base, shift), padded(exact_lse), padded(noise), zeros(shape), bits, scale, bias,
        bias_gain, quantized, length, group=shape.group, sink=FIRST, rule=rule,
    )  # fmt: skip


def check_selection(shape, *, certified, top_p=0.9, offset=1.03, largest=1.0, bias=False, jit=lambda run: run):
    """Against float64 sums over the tokens; returns the kernels' results."""
    arguments = inputs(shape, bias=bias)
    quantized, length = ranges(shape)
    noise = noise_of(shape, largest)
    score = np.asarray(proxy_scores_reference(*arguments), np.float64)
    scored = (np.arange(shape.tokens) >= FIRST) & (np.arange(shape.tokens) < np.asarray(quantized)[:, None])
    tilt = (np.asarray(noise, np.float64)[..., None] * np.asarray(arguments[3], np.float64)[:, :, None]) ** 2
    highest = np.max(np.where(scored[:, None, None], score - tilt, -np.inf), axis=-1)
    base = jnp.asarray(np.where(np.isfinite(highest), highest, 0) + offset, jnp.float32)
    exact_lse = base - 3.0
    rule = rule_of(top_p, certified)
    gain, bias_gain = arguments[2], arguments[5]
    run = jit(lambda a, *rest: select(shape, (*a[:5], bias_gain, a[5]), *rest, rule))
    results = run((*arguments[:5], arguments[6]), noise, base, exact_lse, quantized, length)
    bins, state, (indices, counts, limits) = results
    spreads = np.asarray(spreads_of(state, padded(noise).shape[2]), np.float64)
    bytes_ = np.asarray(bins).view(np.uint8)
    scales, limits = np.asarray(arguments[3], np.float64), np.asarray(limits, np.float64)
    del gain
    for b, k in np.ndindex(noise.shape[:2]):
        least, most = np.zeros(shape.tokens, bool), np.zeros(shape.tokens, bool)
        for g in range(shape.group):
            at = b, k, g
            head = _Head(score[at][scored[b]], np.sqrt(tilt[at][scored[b]]), float(base[at]), float(exact_lse[at]))
            head.check_bytes(bytes_[at][scored[b]])
            head.check_spreads(spreads[at])
            head.check_limits(limits[at], rule, float(noise[at]), exact=offset > 0)
            kept, depth = limits[at][3:5]
            deepest = depth + 8 * K * float(noise[at]) * scales[b, k]
            for union, slack in ((least, -1e-2), (most, 1e-2)):
                keep = bytes_[at] < kept
                if certified:
                    keep |= bytes_[at] <= np.floor(np.clip(deepest + slack, 0, 255))
                union |= keep & scored[b]
        held = ~scored[b] & (np.arange(shape.tokens) < int(length[b]))
        chosen = np.zeros(shape.tokens, bool)
        chosen[np.asarray(indices[b, k, : counts[b, k]])] = True
        assert np.all(chosen >= (least | held)) and np.all(chosen <= (most | held))
        assert np.all(np.diff(np.asarray(indices[b, k, : counts[b, k]])) > 0)
    return results


class _Head:
    """A head's scored tokens in float64, and what the kernels should say of them."""

    def __init__(self, z, sd, base, exact_lse):
        self.z, self.sd, self.base, self.exact_lse = z, sd, base, exact_lse
        self.usable = sd <= 4
        self.depth = 8 * (base - (z - sd**2))
        self.bin = np.clip(np.floor(self.depth), 0, 255).astype(int)

    def check_bytes(self, bytes_):
        want = np.where(self.usable, np.clip(np.floor(8 * (self.base - self.z)), 0, 255), 0)
        near = np.abs(8 * (self.base - self.z) - np.round(8 * (self.base - self.z))) < 2e-3
        assert np.all((bytes_ == want) | (near & (np.abs(bytes_ - want) <= 1)) | (np.abs(self.sd - 4) < 1e-5))

    def check_spreads(self, spreads):
        # That of the middle of the bin, over the one at its upper edge of a token without noise.
        weight = np.where(self.usable, np.exp(self.sd**2 / 2 - 1 / 16), 0)
        want = np.bincount(self.bin, weight, minlength=256)
        near = np.abs(self.depth - np.round(self.depth)) < 2e-3
        slack = np.bincount(self.bin[near], 1.2 * weight[near], minlength=257)[:256]
        slack = slack + np.roll(slack, 1) + np.roll(slack, -1)
        assert np.all(np.abs(spreads - want) <= 2e-3 * want + slack + 2e-3)

    def check_limits(self, limits, rule, noise, exact):
        got_noise, peak, base, kept, depth, below, total, mean_spread = limits
        assert got_noise == pytest.approx(noise) and base == self.base and 1 <= kept <= 256 and kept == int(kept)
        if exact:
            assert peak == base
        tilted = np.where(self.depth < 0, self.z - self.sd**2, self.base - (self.bin + 0.5) / 8)
        weight = np.where(self.usable, np.exp(tilted + self.sd**2 / 2 - peak), 0)
        all_mass = weight.sum() + np.exp(min(self.exact_lse - peak, 60))
        # Tokens above the bins are counted with what they hold at least.
        assert total <= all_mass * (1 + 2e-3) + 1e-6
        if exact:
            assert total == pytest.approx(all_mass, rel=2e-3, abs=1e-6)
        elif len(weight):
            assert total >= weight[np.argmax(np.where(self.usable, self.z - self.sd**2, -np.inf))] * (1 - 2e-3)
        below_at = lambda n: weight[self.bin >= n].sum()  # noqa: E731
        near = np.abs(self.depth - kept) < 2e-3
        assert below == pytest.approx(below_at(kept), rel=4e-3, abs=1.2 * weight[near].sum() + 1e-6 * total)
        if rule.left_out == 0:
            assert kept == 256 and below == 0
            return
        budget, k = rule.left_out * total, K * rule.certified
        square = weight * np.exp(-self.bin / 8 + self.base - peak) * SPREAD * mean_spread

        def bound(n, slack):
            """With the tokens next to an edge on one side of it, or on the other."""
            below = self.depth >= n + slack
            return (1 + SHARED * k) * weight[below].sum() + k * np.sqrt(square[below].sum())

        assert bound(kept, 2e-3) <= budget * 1.01
        assert kept == 1 or bound(kept - 1, -2e-3) >= budget * 0.99
        if rule.certified:
            single = np.log(max(budget - below, LEAST_SINGLE * budget)) + peak
            assert depth == pytest.approx(8 * (base - single), abs=2e-2)
        else:
            largest = self.sd.max(initial=0.0)
            assert depth == pytest.approx(kept - 1 - 8 * K * largest, abs=2e-2)


CASES = [
    (Shape(2, 2, 4, 1024, 128), True, 1.03, 1.0),
    (Shape(1, 2, 5, 512, 64), True, -3.0, 1.0),
    (Shape(1, 1, 1, 1536, 128), False, 1.03, 6.0),
    (Shape(3, 1, 2, 2560, 128), False, -3.0, 0.5),
]


@pytest.mark.parametrize("top_p", [0.3, 0.999])
@pytest.mark.parametrize("shape,certified,offset,largest", CASES, ids=str)
def test_selection_in_an_emulator(shape, certified, offset, largest, top_p, monkeypatch):
    """Deviations below and above the largest that counts; scores above the bins; one pass a block."""
    emulate(monkeypatch)
    check_selection(
        shape, certified=certified, top_p=top_p, offset=offset, largest=largest, bias=shape.group == 4
    )  # fmt: skip


def test_selection_of_everything_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    check_selection(Shape(1, 2, 5, 512, 64), certified=True, top_p=1.0)


def test_selection_of_several_passes_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(mosaic_compact, "BLOCKS", 4)
    shape = Shape(2, 1, 3, 10240, 128)
    assert mosaic_compact.passes_of(2, shape.tokens) > 1
    check_selection(shape, certified=True)


def check_again(shape, jit=lambda run: run):
    """Lists by limits that are given, in some of the kv heads."""
    bins, _, (_, _, limits) = check_selection(shape, certified=True, jit=jit)
    quantized, length = ranges(shape)
    scale = inputs(shape)[3]
    rows = np.arange(shape.batch * shape.kv_heads).reshape(shape.batch, shape.kv_heads) % 3 != 1
    limits = limits.at[..., 3].add(9).at[..., 4].add(3)
    again = jit(
        lambda *arrays: mosaic_certified.select_again(*arrays, quantized, length, sink=FIRST, deviations=K, top_p=0.9)
    )
    # One head of a kv head that is short is enough.
    summary = jnp.ones((*rows.shape, shape.group, 8)).at[:, :, -1, BOUND].set(jnp.where(rows, 0.89, 0.91))
    indices, counts = again(bins, limits, summary, scale)
    bytes_, noise, limits = np.asarray(bins).view(np.uint8), np.asarray(limits)[..., 0], np.asarray(limits)
    position = np.arange(shape.tokens)
    for b, k in np.ndindex(rows.shape):
        if not rows[b, k]:
            assert counts[b, k] == 0
            continue
        scored = (position >= FIRST) & (position < int(quantized[b]))
        least, most = (np.zeros(shape.tokens, bool) for _ in range(2))
        for g in range(shape.group):
            deepest = limits[b, k, g, 4] + 8 * K * noise[b, k, g] * np.asarray(scale, np.float64)[b, k]
            for union, slack in ((least, -1e-2), (most, 1e-2)):
                union |= bytes_[b, k, g] < limits[b, k, g, 3]
                union |= bytes_[b, k, g] <= np.floor(np.clip(deepest + slack, 0, 255))
        chosen = np.zeros(shape.tokens, bool)
        chosen[np.asarray(indices[b, k, : counts[b, k]])] = True
        held = ~scored & (position < int(length[b]))
        assert np.all(chosen >= (least & scored | held)) and np.all(chosen <= (most & scored | held))


def test_selection_by_limits_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    check_again(Shape(2, 2, 4, 1024, 128))


def check_verified_attention(shape, kept_share=0.2):
    """Output, masses and sums of the kernel on bins, in float64 over each query head's own tokens."""
    rng = np.random.default_rng(2)
    heads, tokens, dim = (shape.batch, shape.kv_heads, shape.group), shape.tokens, shape.head_dim
    query, keys, values = (rng.normal(size=(*heads[:2], n, dim)) for n in (heads[2], tokens, tokens))
    true = np.einsum("bkgd,bktd->bkgt", query, keys) * dim**-0.5
    scale = jnp.asarray(rng.uniform(0.5, 2, (*heads[:2], tokens)), jnp.bfloat16)
    noise = rng.uniform(0.3, 1.0, heads)
    sd = noise[..., None] * np.asarray(scale, np.float64)[:, :, None]
    z = true + sd * rng.normal(size=true.shape)
    base = np.quantile(z, 0.999, axis=-1)
    bins = np.clip(np.floor(8 * (base[..., None] - z)), 0, 255).astype(np.uint8)
    kept = np.floor(8 * (base - np.quantile(z, 1 - kept_share, axis=-1)))
    depth = kept - 8 * K * noise * rng.choice([0.9, 10], heads)
    peak = base + rng.normal(size=heads)
    limits = np.stack([noise, peak, base, kept, depth, *[0 * kept] * 3], axis=-1)
    quantized = np.array([tokens - 64 - 32 * b for b in range(heads[0])])
    counts = np.full(heads[:2], tokens // 3)
    indices = np.sort(np.stack([rng.permutation(tokens) for _ in range(counts.size)])[:, : tokens // 3], axis=-1)
    indices = indices.reshape(*heads[:2], -1)
    listed = jnp.asarray(np.pad(indices, [(0, 0)] * 2 + [(0, tokens - indices.shape[-1])]), jnp.int32)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, keys, values)]
    out, sums = verified_attention_of_bins(
        *arrays, listed, jnp.asarray(counts, jnp.int32), jnp.asarray(bins.view(np.int32)), scale,
        jnp.asarray(quantized, jnp.int32), padded(jnp.asarray(limits, jnp.float32)),
        softmax_scale=dim**-0.5, sink=FIRST, deviations=K, **CONSTANTS,
    )  # fmt: skip
    for at in np.ndindex(heads):
        token = indices[at[:2]]
        s, d, byte = true[at][token], sd[at][token], bins[at][token]
        scored = (token >= FIRST) & (token < quantized[at[0]])
        mine = np.maximum(kept[at], np.floor(np.clip(depth[at] + 8 * K * d, 0, 255)) + 1)
        own, weight = scored & (byte < mine), np.exp(s - peak[at])
        np.testing.assert_allclose(
            out[at], np.exp(s) @ values[at[:2]][token] / np.exp(s).sum(), atol=1e-4, err_msg="output"
        )
        threshold = base[at] - mine / 8
        middle = np.where(byte == 0, np.inf, base[at] - (byte + 0.5) / 8)
        tau = np.clip((threshold - s) / d, -12, 12)
        h0, h1, h2 = (np.exp(norm.logcdf(tau - j * d) - norm.logcdf(-tau)) for j in range(3))
        missed = weight * (h0 - h1)
        variance = missed**2 + np.maximum(weight**2 * (h0 - 2 * h1 + np.exp(d**2) * h2), 0)
        near = own & (tau > -6)
        sure = near & (tau < 0.5) & (byte > 0)
        hazard = np.exp(-(tau**2) / 2 - norm.logcdf(-tau)) / np.sqrt(2 * np.pi)
        below = own & (middle - d**2 < base[at] - kept[at] / 8)
        want = [
            weight.sum(),
            weight[own | ~scored].sum(),
            missed[near].sum(),
            variance[near].sum(),
            (1 + tau * hazard - hazard**2)[sure].sum(),
            ((np.where(sure, middle, 0) - s) / d - hazard)[sure].sum(),
            np.exp(middle[below] - d[below] ** 2 / 2 - peak[at]).sum(),
            own.sum(),
        ]
        np.testing.assert_allclose(sums[at], want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("shape", [Shape(2, 2, 4, 512, 32), Shape(1, 2, 1, 512, 64), Shape(1, 1, 5, 1024, 16)], ids=str)
def test_verified_attention_on_bins_in_an_emulator(shape, monkeypatch):
    emulate(monkeypatch)
    check_verified_attention(shape)


def test_normal_distribution_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    # A number for each thread.
    x = np.linspace(-12, 12, 128, dtype=np.float32)
    np.testing.assert_allclose(mosaic_found.normal_cdf(x), norm.cdf(x.astype(np.float64)), rtol=2e-5)


def case(shape, config, seed=0, size=1.0, lengths=None):
    """A cache and queries [B,K,G,D] with a spread of logits of about `size` nats."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    cache = init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, config, dtype=jnp.bfloat16)
    kv = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    length = jnp.asarray(lengths or [shape.tokens - 70] * shape.batch, jnp.int32)
    cache = dataclasses.replace(cache, keys=draw(*kv), values=draw(*kv), length=length)
    cache = jax.jit(attention.build_codes, static_argnames="config")(cache, config=config)
    return size * draw(shape.batch, shape.kv_heads, shape.group, shape.head_dim), cache


def attend(query, cache, config):
    return attention.attend_selected(query, cache, config, query.shape[-1] ** -0.5, jax.random.key(0))


def check_step(config, query, cache, run):
    """A whole step: what it attends holds what it says, and about as much as without the kernels."""
    kernels, plain = (run(query, cache, dataclasses.replace(config, **names)) for names in ({}, XLA))
    out, chosen, stats = kernels
    logits = np.asarray(exact_logits(query, cache), np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    shape = query.shape[:3]
    for b, k in np.ndindex(shape[:2]):
        token = np.asarray(chosen.indices[b, k, : chosen.counts[b, k]])
        captured = weights[b, k][:, token].sum(-1)
        values = np.asarray(cache.values, np.float64)[b, k][token]
        want = (weights[b, k][:, token] @ values) / captured[:, None]
        np.testing.assert_allclose(np.asarray(out, np.float64)[b, k], want, atol=2e-2)
        verified = np.asarray(stats.verified).reshape(shape)[b, k]
        np.testing.assert_allclose(verified, captured, atol=0.03)
        if config.selection == "certified":
            assert np.all((captured >= config.top_p) | ~np.asarray(stats.certified).reshape(shape)[b, k])
    mean = lambda x: float(jnp.mean(x.astype(jnp.float32)))  # noqa: E731
    assert mean(stats.verified) == pytest.approx(mean(plain[2].verified), abs=0.02)
    assert mean(stats.bound) == pytest.approx(mean(plain[2].bound), abs=0.1)
    assert mean(stats.kept) == pytest.approx(mean(plain[2].kept), rel=0.15)
    assert mean(stats.scored) == pytest.approx(mean(plain[2].scored), rel=0.15)
    return kernels


XLA = dict(scores="xla", select="xla", attend="xla")
RULES = [("debiased", 0.8, 0.7), ("certified", 0.8, 0.7), ("certified", 0.95, 1.5), ("debiased", 1.0, 1.0)]


@pytest.mark.parametrize("rule,top_p,size", RULES)
def test_step_in_an_emulator(rule, top_p, size, monkeypatch):
    """All of a step outside of jit, the Hopper kernels in the emulator and the portable ones interpreted."""
    config = RaBitQConfig(top_p=top_p, selection=rule, interval=64, sink=4)
    query, cache = case(Shape(1, 2, 3, 1024, 128), config, size=size)

    def run(query, cache, config):
        if config.select == "xla":
            return jax.jit(attend, static_argnames="config")(query, cache, config=config)
        with monkeypatch.context() as patch, jax.disable_jit():
            emulate(patch)
            patch.setattr(selection, "on_hopper", lambda: True)
            return attend(query, cache, dataclasses.replace(config, attend="pallas"))

    check_step(config, query, cache, run)


def test_tokens_of_large_deviation_say_nothing_of_others(monkeypatch):
    """They are kept whatever their scores, so that none like them was missed."""
    config = RaBitQConfig(top_p=0.95, selection="debiased", interval=64, sink=4)
    query, cache = case(Shape(1, 1, 2, 1024, 64), config, size=6.0)
    sd = NoisyScores(query, cache, config, 64**-0.5, jax.random.key(0), 0)._noisy.deviation
    scored = slice(config.sink, int(cache.quantized[0]))
    large = np.asarray(sd[0, 0, :, scored]) > LARGEST_DEVIATION
    assert np.all((large.mean(axis=-1) > 0.05) & (large.mean(axis=-1) < 0.95))
    with monkeypatch.context() as patch, jax.disable_jit():
        emulate(patch)
        patch.setattr(selection, "on_hopper", lambda: True)
        _, chosen, stats = attend(query, cache, dataclasses.replace(config, attend="pallas"))
    listed = np.asarray(chosen.indices[0, 0, : chosen.counts[0, 0]])
    assert np.isin(np.flatnonzero(large.any(axis=0)) + config.sink, listed).all()
    weights = jax.nn.softmax(exact_logits(query, cache), axis=-1)
    captured = np.asarray(weights)[0, 0][:, listed].sum(-1)
    np.testing.assert_allclose(np.asarray(stats.verified).ravel(), captured, atol=0.05)


def limits_and_search(bins: NoisyBins):
    """A step's limits of the real heads, and `find_bulk` of them all."""
    group = bins._query.shape[2]
    limits = _Limits(*jnp.moveaxis(bins.limits()[:, :, :group], -1, 0))
    spreads = spreads_of(bins._state, bins._heads)[:, :, :group]
    # From the worst bin up, behind a zero.
    spreads = jnp.pad(spreads[..., :0:-1], [(0, 0)] * 3 + [(1, 0)])

    def of_head(limits, *rest):
        return find_bulk(_Limits(*limits), *rest, deviations=deviations)

    def search(budget, level, k):
        nonlocal deviations
        deviations = k
        return jnp.vectorize(lambda *x: of_head(x[:8], *x[8:]), signature="(),(),(),(),(),(),(),(),(n),(),()->(),()")(
            *dataclasses.astuple(limits), spreads, budget, level
        )

    deviations = 0.0
    return limits, search


def test_bins_answer_as_scores_do_in_an_emulator(monkeypatch):
    """Masses, deviations and thresholds of budgets; and the search of a second round finds what the first one found."""
    config = RaBitQConfig(top_p=0.9, selection="certified", interval=64, sink=4)
    query, cache = case(Shape(1, 2, 3, 1024, 128), config)
    arguments = query, cache, config, 128**-0.5, jax.random.key(0), 0
    emulate(monkeypatch)
    bins, scores = NoisyBins(*arguments), NoisyScores(*arguments)
    limits, search = limits_and_search(bins)
    mass, want_mass = limits.mass, scores._mass
    total = lambda mass: np.asarray(mass.peak + jnp.log(mass.total))  # noqa: E731
    np.testing.assert_allclose(total(mass), total(want_mass), atol=2e-2)
    np.testing.assert_allclose(mass.mean_deviation, want_mass.mean_deviation, rtol=0.1)

    thresholds = limits.thresholds(K)
    budget = left_out(config.top_p, certified=True) * mass.total
    bulk, again = search(budget, 0 * budget, K)
    np.testing.assert_array_equal(bulk, thresholds.bulk)
    np.testing.assert_allclose(again, limits.below, rtol=1e-4, atol=1e-6)

    for share, level in ((0.02, 0.0), (0.1, 2.0)):
        levels = jnp.full_like(budget, level)
        edge, low = search(share * mass.total, levels, 0.0)
        want, want_low = thresholds_module.find_bulk(scores._noisy, want_mass, share * want_mass.total, levels, 0.0)
        # Two grids of 1/8 nat.
        np.testing.assert_allclose(edge, want, atol=0.26)
        np.testing.assert_allclose(low * jnp.exp(mass.peak - want_mass.peak), want_low, rtol=0.3)
        assert np.all(max(level, 1) * low <= share * mass.total * (1 + 1e-5))


@pytest.mark.parametrize("is_short", [False, True])
def test_what_follows_from_sums_in_an_emulator(is_short, monkeypatch):
    """The kernel's certificates, and limits of a second round, are those of certificate.py and thresholds.py."""
    config = RaBitQConfig(top_p=0.9, selection="certified", interval=64, sink=4)
    query, cache = case(Shape(1, 2, 3, 1024, 128), config, size=0.7)
    emulate(monkeypatch)
    bins = NoisyBins(query, cache, config, 128**-0.5, jax.random.key(0), 0)
    # What a lower p keeps is not enough.
    chosen = bins
    if is_short:
        chosen = NoisyBins(query, cache, dataclasses.replace(config, top_p=0.5), 128**-0.5, jax.random.key(0), 0)
    first, lists = chosen.limits(), chosen.keep(chosen.limits())
    found = bins.attend(*lists, first)
    _, sums = verified_attention_of_bins(
        query, cache.keys, cache.values, *lists, bins._bins, bins._scale, cache.quantized, first,
        softmax_scale=128**-0.5, sink=config.sink, deviations=K, **CONSTANTS,
    )  # fmt: skip
    _, search = limits_and_search(bins)
    limits = _Limits(*jnp.moveaxis(first[:, :, :3], -1, 0))
    attended, own, terms = masses(tuple(jnp.moveaxis(sums, -1, 0)))
    thresholds, scored = limits.thresholds(K), cache.quantized - config.sink
    want = certify(terms, limits.below, attended, own, scored, limits.mass, thresholds)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found.certificate, want)
    np.testing.assert_array_equal(found.number, terms.number)
    short = want.bound < config.top_p
    assert bool(jnp.all(short)) == bool(jnp.any(short)) == is_short
    lower, below = extended_thresholds(search, limits.mass, thresholds, limits.below, want, short, top_p=config.top_p)
    assert dataclasses.fields(want)[BOUND].name == "bound"
    again = bins.lower(first, found)
    got = _Limits(*jnp.moveaxis(again[:, :, :3], -1, 0))
    np.testing.assert_allclose(got.thresholds(K).bulk, lower.bulk, rtol=1e-5)
    np.testing.assert_allclose(got.thresholds(K).single, lower.single, rtol=1e-5)
    np.testing.assert_allclose(got.below, below, rtol=1e-4)
    is_lower = (got.kept > limits.kept) | (got.depth > limits.depth)
    np.testing.assert_array_equal(is_lower, short)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")
@pytest.mark.parametrize("certified", [False, True])
def test_kernels_lower(certified, monkeypatch):
    shape = Shape(2, 2, 5, 1024, 128)
    arguments, noise = inputs(shape), noise_of(shape, 1.0)
    quantized, length = ranges(shape)
    heads = jnp.zeros(noise.shape)

    def run(front, shift, noise, heads):
        bins, state, (indices, counts, limits) = select(
            shape, (*front, arguments[5], shift), noise, heads, heads, quantized, length, rule_of(0.9, certified)
        )
        summary = jnp.broadcast_to(noise[..., None], (*noise.shape, 8))
        again = mosaic_certified.select_again(
            bins, limits, summary, front[3], quantized, length, sink=FIRST, deviations=K, top_p=0.9
        )
        return indices, again, state

    text = kernel_text(monkeypatch, run, arguments[:5], arguments[6], noise, heads)
    assert "score_bins" in text and "compact" in text


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")
def test_a_step_lowers(monkeypatch):
    config = RaBitQConfig(selection="certified", select="mosaic", attend="pallas")
    shape = Shape(2, 2, 5, 1024, 64)
    cache = jax.eval_shape(lambda: init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, config))
    query = jax.ShapeDtypeStruct((shape.batch, shape.kv_heads, shape.group, shape.head_dim), jnp.bfloat16)
    monkeypatch.setattr(selection, "on_hopper", lambda: True)

    def step(query, cache):
        out, _, stats = attend(query, cache, config)
        return out, stats

    text = kernel_text(monkeypatch, step, query, cache)
    assert all(kernel in text for kernel in ("score_bins", "compact", "found_sums", "combine_parts", "lower_limits"))


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and JAX 0.11")
class TestOnHopper:
    @pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
    @pytest.mark.parametrize(
        "shape,certified,offset,largest",
        [*CASES, (Shape(1, 8, 4, 131072, 128), True, 1.03, 1.0), (Shape(1, 2, 16, 3072, 384), True, -3.0, 1.0)],
        ids=str,
    )
    def test_selection(self, shape, certified, offset, largest, top_p):
        check_selection(shape, certified=certified, top_p=top_p, offset=offset, largest=largest, jit=jax.jit)

    def test_selection_by_limits(self):
        check_again(Shape(2, 8, 4, 10240, 128), jit=jax.jit)

    @pytest.mark.parametrize("shape", [Shape(1, 8, 4, 32768, 128), Shape(2, 2, 16, 2048, 64)], ids=str)
    def test_verified_attention(self, shape):
        check_verified_attention(shape, kept_share=0.05)

    @pytest.mark.parametrize("rule,top_p,size", RULES)
    @pytest.mark.parametrize("shape", [Shape(2, 8, 4, 8192, 128), Shape(1, 2, 5, 1024, 64)], ids=str)
    def test_step(self, shape, rule, top_p, size):
        config = RaBitQConfig(top_p=top_p, selection=rule)
        query, cache = case(shape, config, size=size)
        run = jax.jit(attend, static_argnames="config")
        runs = [check_step(config, query, cache, lambda *args: run(*args[:2], config=args[2])) for _ in range(2)]
        held = jnp.arange(shape.tokens) < runs[0][1].counts[..., None]
        bits = lambda run: (run[0], jnp.where(held, run[1].indices, 0), run[1].counts, run[2])  # noqa: E731
        jax.tree.map(np.testing.assert_array_equal, bits(runs[0]), bits(runs[1]))
