"""Steps of debiased and certified selection on Hopper: what bins answer, what follows from sums over found tokens, and
whole steps against exact attention and the definition, in an emulator and on the GPU."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.exact import exact_logits
from benchmarks.planting import spread_keys
from benchmarks.shapes import Shape
from pallas_kernels import mosaic_certified, mosaic_conclusion, mosaic_extend
from pallas_kernels.mosaic_bins import BINS, PLACES, counts_and_peaks
from pallas_kernels.prepare_query import sample_positions
from rabitq_jax import RaBitQConfig, attention
from rabitq_jax import thresholds as thresholds_module
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.cache import init_layer_cache
from rabitq_jax.certificate import certify
from rabitq_jax.noisy_bins import NoisyBins
from rabitq_jax.noisy_scores import NoisyScores
from rabitq_jax.thresholds import HeadMass, Thresholds, confidence, extended_thresholds, left_out, upper_bound
from rabitq_jax.verified_attention import masses
from tests.test_lowering import kernel_text
from tests.test_mosaic_certified import sums_of_lists
from tests.test_mosaic_kernels import emulate, take_for_hopper

pytestmark = pytest.mark.kernel
K = confidence(1e-3)


def case(shape, config, seed=0, size=1.0, lengths=None, planted=None):
    """A cache and queries [B,K,G,D] with a spread of logits of about `size` nats, or of so many that are planted."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    cache = init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, config, dtype=jnp.bfloat16)
    kv = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    length = jnp.asarray(lengths or [shape.tokens - 70] * shape.batch, jnp.int32)
    keys, values = draw(*kv), draw(*kv)
    query = size * draw(shape.batch, shape.kv_heads, shape.group, shape.head_dim)
    if planted is not None:
        keys = spread_keys(jax.random.key(seed), query, jnp.full(shape.batch, planted), shape.tokens)
    cache = dataclasses.replace(cache, keys=keys, values=values, length=length)
    return query, jax.jit(attention.build_codes, static_argnames="config")(cache, config=config)


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


@pytest.mark.parametrize("rule,top_p,size", RULES[::2])
def test_step_in_an_emulator(rule, top_p, size, monkeypatch):
    """All of a step outside of jit, the Hopper kernels in the emulator and the portable ones interpreted."""
    config = RaBitQConfig(top_p=top_p, selection=rule, interval=64, sink=4)
    query, cache = case(Shape(1, 2, 3, 1024, 128), config, size=size)

    def run(query, cache, config):
        if config.select == "xla":
            return jax.jit(attend, static_argnames="config")(query, cache, config=config)
        with monkeypatch.context() as patch, jax.disable_jit():
            emulate(patch)
            take_for_hopper(patch)
            return attend(query, cache, config)

    check_step(config, query, cache, run)


def test_sharp_attention_keeps_few_tokens_in_an_emulator(monkeypatch):
    """Logits that deviate by 24 nats: where bins begin is a guess, and they cover 32 nats."""
    config = RaBitQConfig(interval=64, sink=4)
    query, cache = case(Shape(1, 1, 4, 2048, 128), config, planted=24.0)
    want = jax.jit(attend, static_argnames="config")(query, cache, config=dataclasses.replace(config, **XLA))[1]
    with jax.disable_jit():
        emulate(monkeypatch)
        take_for_hopper(monkeypatch)
        got = attend(query, cache, dataclasses.replace(config, attend="mosaic"))[1]
    assert want.counts[0, 0] <= got.counts[0, 0] <= 1.1 * want.counts[0, 0] + 4


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the kernels, and counts of bins [...,256,2], as thresholds.py speaks of them."""

    numbers: jax.Array
    counted: jax.Array

    @classmethod
    def of(cls, bins: NoisyBins, limits):
        group, heads = bins._query.shape[2], limits.shape[2]
        scored = jnp.maximum(bins._cache.quantized - bins._config.sink, 0)
        counted = counts_and_peaks(bins._state[...], heads, scored)[0][:, :, :group]
        return cls(np.asarray(limits, np.float64)[:, :, :group], np.asarray(counted, np.float64))

    def __getattr__(self, name):
        return self.numbers[..., ["noise", "peak", "base", "kept", "depth", "below", "total", "last"].index(name)]

    @property
    def thresholds(self):
        bulk = np.where(self.kept == BINS, -np.inf, self.base - self.kept / 8)
        return Thresholds(bulk=bulk, single=self.base - self.depth / 8, deviations=K)

    def mass(self, bins: NoisyBins):
        """With the typical deviation of the tokens that the kernels sample."""
        sink, quantized = bins._config.sink, bins._cache.quantized[:, None]
        token = sample_positions(quantized, sink, bins._scale.shape[2])[:, None]
        scales = np.take_along_axis(np.asarray(bins._scale, np.float64), np.asarray(token), axis=-1)
        deviation = self.noise * np.sqrt(np.mean(scales**2, axis=-1))[..., None]
        return HeadMass(peak=self.peak, total=self.total, mean_deviation=deviation)

    def find_bulk(self, budget, level, deviations):
        """Whole bins, of which the best is always kept."""
        edge = np.exp(self.base[..., None] - self.peak[..., None] - np.arange(BINS) / 8)
        width = np.where(np.arange(BINS) == BINS - 1, 0, 1 - np.exp(-1 / 8))
        mass = edge * (self.counted[..., 1] - width * self.counted[..., 0] / PLACES)
        square = mass**2 / np.maximum(self.counted[..., 1], 1)
        # Of what lies in a bin and behind it, of 1 to 256.
        first, second = (np.flip(np.cumsum(np.flip(x, -1), -1), -1)[..., 1:] for x in (mass, square))
        first, second = (np.concatenate([x, 0 * x[..., :1]], axis=-1) for x in (first, second))
        fits = (
            np.asarray(upper_bound(first, second, np.asarray(level)[..., None], deviations))
            <= np.asarray(budget)[..., None]
        )
        kept = 1 + np.argmax(fits, axis=-1)
        below = np.take_along_axis(first, kept[..., None] - 1, axis=-1)[..., 0]
        return np.where(kept == BINS, -np.inf, self.base - kept / 8), below


def test_bins_answer_as_scores_do_in_an_emulator(monkeypatch):
    """Masses, deviations and thresholds of budgets."""
    config = RaBitQConfig(top_p=0.9, selection="certified", interval=64, sink=4)
    query, cache = case(Shape(1, 2, 3, 1024, 128), config)
    arguments = query, cache, config, 128**-0.5, jax.random.key(0), 0
    emulate(monkeypatch)
    bins, scores = NoisyBins(*arguments), NoisyScores(*arguments)
    limits = Limits.of(bins, bins.limits())
    mass, want_mass = limits.mass(bins), scores._mass
    total = lambda mass: np.asarray(mass.peak + jnp.log(mass.total))  # noqa: E731
    np.testing.assert_allclose(total(mass), total(want_mass), atol=5e-3)
    np.testing.assert_allclose(mass.mean_deviation, want_mass.mean_deviation, rtol=0.1)
    budget = left_out(config.top_p, certified=True) * mass.total
    bulk, below = limits.find_bulk(budget, 0 * budget, K)
    np.testing.assert_allclose(bulk, limits.thresholds.bulk, rtol=1e-5)
    np.testing.assert_allclose(below, limits.below, rtol=1e-3, atol=1e-6)
    for share, level in ((0.02, 0.0), (0.1, 2.0)):
        levels = np.full_like(budget, level)
        edge, low = limits.find_bulk(share * mass.total, levels, 0.0)
        want, want_low = thresholds_module.find_bulk(scores._noisy, want_mass, share * want_mass.total, levels, 0.0)
        # Two grids of 1/8 nat.
        np.testing.assert_allclose(edge, want, atol=0.26)
        np.testing.assert_allclose(low * np.exp(mass.peak - want_mass.peak), want_low, rtol=0.3)


def first_round(shape, config, rows=True, stretch=1.0):
    """A first round, in some kv heads by the limits of a lower p, which are not enough: estimates, limits, lists, and
    what follows. With a stretch of the queries, exact logits are larger than estimates say."""
    query, cache = case(shape, config, size=0.7)
    arguments = config, shape.head_dim**-0.5, jax.random.key(0), 0
    bins = NoisyBins(query, cache, *arguments)
    low = NoisyBins(query, cache, dataclasses.replace(config, top_p=0.5), *arguments[1:])
    rows = jnp.broadcast_to(rows, query.shape[:2])
    pick = lambda low, high: jnp.where(rows.reshape(*rows.shape, *(1,) * (high.ndim - 2)), low, high)  # noqa: E731
    limits = pick(low.limits(), bins.limits())
    lists = tuple(map(pick, low.keep(None), bins.keep(None)))
    bins._query = (stretch * query).astype(query.dtype)
    return bins, limits, lists, bins.attend(lists, limits)


@pytest.mark.parametrize("is_short,stretch", [(False, 1.0), (True, 1.6)])
def test_what_follows_from_sums_in_an_emulator(is_short, stretch, monkeypatch):
    """The kernel's certificates, and limits of a second round, are those of certificate.py and thresholds.py."""
    emulate(monkeypatch)
    config = RaBitQConfig(top_p=0.9, selection="certified", interval=64, sink=4)
    bins, first, lists, found = first_round(Shape(1, 2, 3, 1024, 128), config, is_short, stretch)
    *_, partial = mosaic_certified.attend(
        bins._query, bins._cache.keys, bins._cache.values, *lists, bins._bins, bins._scale, bins._cache.quantized,
        first, jax.new_ref(0 * bins._state[...]), softmax_scale=128**-0.5, sink=config.sink, rule=bins._rule,
        dtype=bins._query.dtype,
    )  # fmt: skip
    sums = sums_of_lists(partial, found.number.shape)
    limits = Limits.of(bins, first)
    mass, thresholds = limits.mass(bins), limits.thresholds
    attended, own, terms = masses(tuple(jnp.moveaxis(sums, -1, 0)))
    scored = bins._cache.quantized - config.sink
    want = certify(terms, limits.below, attended, own, scored, mass, thresholds)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found.certificate, want)
    np.testing.assert_array_equal(found.number, terms.number)
    np.testing.assert_array_equal(found.counts, lists[1])
    short = np.asarray(want.bound < config.top_p)
    assert np.all(short) == np.any(short) == is_short
    got = Limits.of(bins, bins._second)
    np.testing.assert_array_equal(bins._short[:, :, :3], short)
    np.testing.assert_allclose(got.total, mass.mean_deviation, rtol=1e-4)
    lower, below = extended_thresholds(
        limits.find_bulk, mass, thresholds, limits.below, want, short, top_p=config.top_p
    )  # fmt: skip
    if is_short:
        # The level that was verified decides how much lower.
        ignored = dataclasses.replace(want, bulk=0 * want.bulk)
        other, _ = extended_thresholds(
            limits.find_bulk, mass, thresholds, limits.below, ignored, short, top_p=config.top_p
        )  # fmt: skip
        assert np.mean(other.bulk > lower.bulk) > 0.5
    np.testing.assert_allclose(got.thresholds.bulk, lower.bulk, rtol=1e-5)
    np.testing.assert_allclose(got.thresholds.single, lower.single, rtol=1e-5)
    np.testing.assert_allclose(got.below, below, rtol=1e-3)
    np.testing.assert_array_equal((got.kept > limits.kept) | (got.depth > limits.depth), short)


def decided_by_scales(limits, scale):
    """Limits by which a token's scale decides whether it is kept, in some bins behind those that are kept."""
    noise, kept = limits[..., 0], limits[..., 3]
    typical = jnp.mean(scale.astype(jnp.float32), axis=-1)[..., None]
    return limits.at[..., 4].set(kept - 8 * K * noise * typical + 4 * (noise * typical) ** 2)


def check_second_round(shape, dtype, jit=lambda run: run):
    """In kv heads that are short, what attention over a list by the lower limits gives; in the others, what was."""
    config = RaBitQConfig(top_p=0.9, selection="certified", interval=64, sink=4)
    rows = jnp.arange(shape.batch * shape.kv_heads).reshape(shape.batch, shape.kv_heads) % 3 != 1

    def run():
        bins, limits, lists, first = first_round(shape, config, rows)
        bins._cache = dataclasses.replace(
            bins._cache, keys=bins._cache.keys.astype(dtype), values=bins._cache.values.astype(dtype)
        )  # fmt: skip
        bins._second = decided_by_scales(bins._second, bins._scale)
        # Any head's mark is enough; what is not a head's is ignored.
        marks = jnp.any(bins._short[:, :, : shape.group] > 0, axis=-1)
        bins._short = jnp.ones_like(bins._short).at[:, :, : shape.group].set(0).at[:, :, shape.group - 1].set(marks)
        last, short, indices = bins.extend(limits, first, lists[0])
        again, counts = mosaic_certified.select_again(
            bins._bins, bins._second, bins._short, bins._scale, bins._cache.quantized, bins._cache.length,
            sink=config.sink, deviations=bins._rule.deviations,
        )  # fmt: skip
        want = mosaic_certified.attend(
            bins._query, bins._cache.keys, bins._cache.values, again, counts, bins._bins, bins._scale,
            bins._cache.quantized, bins._second, jax.new_ref(jnp.zeros_like(bins._state[...])),
            softmax_scale=shape.head_dim**-0.5, sink=config.sink, rule=bins._rule, dtype=first.out.dtype,
        )  # fmt: skip
        return first, last, short, indices, again, counts, want[:2]

    first, last, short, indices, again, counts, (out, summary) = jit(run)()
    np.testing.assert_array_equal(jnp.any(short, axis=-1), rows)
    for b, k in np.ndindex(rows.shape):
        if not rows[b, k]:
            np.testing.assert_array_equal(last.out[b, k], first.out[b, k])
            np.testing.assert_array_equal(last.summary[b, k], first.summary[b, k])
            continue
        assert last.counts[b, k] == counts[b, k] > first.counts[b, k]
        np.testing.assert_array_equal(*(x[b, k, : counts[b, k]] for x in (indices, again)))
        np.testing.assert_allclose(last.out[b, k], out[b, k], atol=1e-2)
        np.testing.assert_allclose(last.summary[b, k], summary[b, k], rtol=2e-3, atol=1e-5)


SECOND_ROUNDS = [
    (Shape(1, 2, 3, 2560, 128), jnp.bfloat16),
    (Shape(2, 1, 5, 512, 64), jnp.bfloat16),
    (Shape(1, 1, 1, 512, 80), jnp.float16),
    (Shape(17, 2, 1, 512, 64), jnp.bfloat16),
]


@pytest.mark.parametrize("shape,dtype", SECOND_ROUNDS, ids=str)
def test_second_round_in_an_emulator(shape, dtype, monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(mosaic_extend, "BLOCKS", 7)
    # Tokens without codes take more rounds than chunks do.
    monkeypatch.setattr(mosaic_extend, "RECENT", 24)
    check_second_round(shape, dtype)


@pytest.mark.parametrize("blocks", [7, 264, 1000])
def test_parts_of_a_second_round_in_an_emulator(blocks, monkeypatch):
    """As many as there are blocks for, a power of two, and no more than are concluded."""
    emulate(monkeypatch)
    sizes = types.SimpleNamespace(blocks=blocks)
    for number in (1, 2, 3, 7, blocks // 2, blocks // 2 + 1, blocks):
        log2_parts = int(mosaic_extend._log2_parts(sizes, mosaic_extend.m.value(number))[0])
        parts = 2**log2_parts
        assert parts <= mosaic_conclusion.LARGEST_PARTS and parts * number <= blocks
        assert parts == mosaic_conclusion.LARGEST_PARTS or 2 * parts * number > blocks


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")
def test_a_step_lowers(monkeypatch):
    config = RaBitQConfig(selection="certified", select="mosaic")
    shape = Shape(2, 2, 5, 1024, 64)
    cache = jax.eval_shape(lambda: init_layer_cache(shape.batch, shape.tokens, shape.kv_heads, shape.head_dim, config))
    query = jax.ShapeDtypeStruct((shape.batch, shape.kv_heads, shape.group, shape.head_dim), jnp.bfloat16)
    take_for_hopper(monkeypatch)

    def step(query, cache):
        out, _, stats = attend(query, cache, config)
        return out, stats

    text = kernel_text(monkeypatch, step, query, cache)
    kernels = "prepare_query", "score_bins", "compact", "gathered_attention", "verify", "extend"
    assert all(kernel in text for kernel in kernels)


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


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and JAX 0.11")
@pytest.mark.parametrize("shape,dtype", [*SECOND_ROUNDS, (Shape(2, 8, 4, 32768, 128), jnp.bfloat16)], ids=str)
def test_second_round_on_hopper(shape, dtype):
    check_second_round(shape, dtype, jax.jit)
