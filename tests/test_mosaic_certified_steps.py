"""Steps of debiased and certified selection on Hopper: what bins answer, what follows from sums over found tokens, and
whole steps against exact attention and the definition, in an emulator and on the GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.exact import exact_logits
from benchmarks.shapes import Shape
from pallas_kernels.mosaic_bins import PLACES, counts_and_peaks
from pallas_kernels.mosaic_rules import BOUND
from pallas_kernels.verified_attention import verified_attention_of_bins
from rabitq_jax import RaBitQConfig, attention, selection
from rabitq_jax import thresholds as thresholds_module
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.certificate import certify
from rabitq_jax.noisy_bins import NoisyBins, _Limits, find_bulk, sample_scales
from rabitq_jax.noisy_scores import NoisyScores
from rabitq_jax.thresholds import confidence, extended_thresholds, left_out
from rabitq_jax.verified_attention import CONSTANTS, masses
from tests.test_lowering import kernel_text
from tests.test_mosaic_kernels import emulate

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("quick_compilation")]
K = confidence(1e-3)


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


def limits_and_search(bins: NoisyBins):
    """A step's limits of the real heads, and `find_bulk` of them all."""
    group = bins._query.shape[2]
    limits = _Limits(*jnp.moveaxis(bins.limits()[:, :, :group], -1, 0))
    counted = counts_and_peaks(bins._state, bins._heads)[0][:, :, :group].astype(jnp.float32)
    # From the worst bin up, behind a zero.
    places, counts = (jnp.pad(counted[..., :0:-1, i], [(0, 0)] * 3 + [(1, 0)]) for i in range(2))

    def of_head(limits, *rest):
        return find_bulk(_Limits(*limits), *rest, deviations=deviations)

    def search(budget, level, k):
        nonlocal deviations
        deviations = k
        numbers = ",".join(["()"] * 8)
        return jnp.vectorize(lambda *x: of_head(x[:8], *x[8:]), signature=f"{numbers},(n),(n),(),()->(),()")(
            *dataclasses.astuple(limits), places / PLACES, counts, budget, level
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
    mass, want_mass = mass_of(bins, limits), scores._mass
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


def mass_of(bins: NoisyBins, limits: _Limits):
    scales = [
        [sample_scales(scale, quantized, bins._config.sink) for scale in scales]
        for scales, quantized in zip(bins._scale, bins._cache.quantized, strict=True)
    ]
    return limits.mass(jnp.asarray(scales)[:, :, None])


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
    mass = mass_of(bins, limits)
    want = certify(terms, limits.below, attended, own, scored, mass, thresholds)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found.certificate, want)
    np.testing.assert_array_equal(found.number, terms.number)
    short = want.bound < config.top_p
    assert bool(jnp.all(short)) == bool(jnp.any(short)) == is_short
    lower, below = extended_thresholds(search, mass, thresholds, limits.below, want, short, top_p=config.top_p)
    assert dataclasses.fields(want)[BOUND].name == "bound"
    again = bins.lower(first, found)
    got = _Limits(*jnp.moveaxis(again[:, :, :3], -1, 0))
    np.testing.assert_allclose(got.thresholds(K).bulk, lower.bulk, rtol=1e-5)
    np.testing.assert_allclose(got.thresholds(K).single, lower.single, rtol=1e-5)
    np.testing.assert_allclose(got.below, below, rtol=1e-4)
    is_lower = (got.kept > limits.kept) | (got.depth > limits.depth)
    np.testing.assert_array_equal(is_lower, short)


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
@pytest.mark.parametrize("rule,top_p,size", RULES)
@pytest.mark.parametrize("shape", [Shape(2, 8, 4, 8192, 128), Shape(1, 2, 5, 1024, 64)], ids=str)
def test_step_on_hopper(shape, rule, top_p, size):
    config = RaBitQConfig(top_p=top_p, selection=rule)
    query, cache = case(shape, config, size=size)
    run = jax.jit(attend, static_argnames="config")
    runs = [check_step(config, query, cache, lambda *args: run(*args[:2], config=args[2])) for _ in range(2)]
    held = jnp.arange(shape.tokens) < runs[0][1].counts[..., None]
    bits = lambda run: (run[0], jnp.where(held, run[1].indices, 0), run[1].counts, run[2])  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, bits(runs[0]), bits(runs[1]))
