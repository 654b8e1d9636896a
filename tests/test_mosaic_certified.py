"""Scores with noise on Hopper: counts of bins, limits, lists and verified attention, in an emulator and on the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.shapes import Shape
from pallas_kernels import mosaic_certified, mosaic_compact, mosaic_found
from pallas_kernels.mosaic_bins import bytes_of, counts_and_peaks, words_of
from rabitq_jax import RaBitQConfig
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.noisy_bins import rule_of
from rabitq_jax.scores import proxy_scores_reference
from rabitq_jax.thresholds import LEAST_SINGLE, SHARED, confidence
from tests.test_lowering import kernel_text
from tests.test_mosaic_kernels import FIRST, emulate, inputs, padded, prepared, ranges, zeros

pytestmark = pytest.mark.kernel
K = confidence(1e-3)


def rule(top_p, certified):
    return rule_of(RaBitQConfig(top_p=top_p, selection="certified" if certified else "debiased", failure_rate=1e-3))


def noise_of(shape, largest):
    """Deviations up to 2 `largest`, since scales go up to 2."""
    size = (shape.batch, shape.kv_heads, shape.group)
    return jnp.asarray(np.random.default_rng(1).uniform(0.3, largest, size), jnp.float32)


def select(shape, arguments, noise, base, exact_lse, quantized, length, rule, *, sink=FIRST):
    levels, bits, gain, scale, bias, bias_gain, shift = arguments
    state = jax.new_ref(zeros(shape))
    bins, chosen = mosaic_certified.score_and_select(
        *prepared(levels, gain, base, shift), padded(exact_lse), padded(noise), state, bits, scale, bias,
        bias_gain, quantized, length, group=shape.group, sink=sink, rule=rule,
    )  # fmt: skip
    return bins, jax.freeze(state), chosen


def check_selection(shape, *, certified, top_p=0.9, offset=1.03, largest=1.0, bias=False, jit=lambda run: run):
    """Against float64 sums over the tokens; returns the kernels' results."""
    arguments = inputs(shape, bias=bias)
    quantized, length = ranges(shape)
    noise = noise_of(shape, largest)
    score = np.asarray(proxy_scores_reference(*arguments), np.float64)
    scored = (np.arange(shape.tokens) >= FIRST) & (np.arange(shape.tokens) < np.asarray(quantized)[:, None])
    sd = np.asarray(noise, np.float64)[..., None] * np.asarray(arguments[3], np.float64)[:, :, None]
    highest = np.max(np.where(scored[:, None, None], score - sd**2 / 2, -np.inf), axis=-1)
    base = jnp.asarray(np.where(np.isfinite(highest), highest, 0) + offset, jnp.float32)
    exact_lse = base - 3.0
    promise = rule(top_p, certified)
    gain, bias_gain = arguments[2], arguments[5]
    run = jit(lambda a, *rest: select(shape, (*a[:5], bias_gain, a[5]), *rest, promise))
    results = run((*arguments[:5], arguments[6]), noise, base, exact_lse, quantized, length)
    bins, state, (indices, counts, limits) = results
    counted = np.asarray(counts_and_peaks(state, padded(noise).shape[2], jnp.maximum(quantized - FIRST, 0))[0])
    bytes_ = np.asarray(bytes_of(bins))
    limits = np.asarray(limits, np.float64)
    del gain
    for b, k in np.ndindex(noise.shape[:2]):
        least, most = np.zeros(shape.tokens, bool), np.zeros(shape.tokens, bool)
        for g in range(shape.group):
            at = b, k, g
            head = _Head(score[at][scored[b]], sd[at][scored[b]], float(base[at]), float(exact_lse[at]))
            head.check_bytes(bytes_[at][scored[b]])
            head.check_counts(counted[at])
            head.check_limits(limits[at], promise, float(noise[at]), exact=offset > 0)
            assert limits[at][7] == np.max(np.asarray(arguments[3], np.float64)[b, k][scored[b]], initial=0)
            kept, depth = limits[at][3:5]
            deepest = depth + 8 * K * sd[at] - 4 * sd[at] ** 2
            for union, slack in ((least, -1e-2), (most, 1e-2)):
                keep = bytes_[at] < kept
                if certified:
                    keep |= bytes_[at] <= np.floor(np.clip(deepest + slack, 0, 255))
                union |= keep & scored[b]
        held = ~scored[b] & (np.arange(shape.tokens) < int(length[b]))
        chosen = np.zeros(shape.tokens, bool)
        chosen[np.asarray(indices[b, k, : counts[b, k]])] = True
        assert np.all(chosen >= (least | held)) and np.all(chosen <= (most | held))
        listed = np.asarray(indices[b, k, : counts[b, k]])
        assert np.all(np.diff(listed) > 0)
    return results


class _Head:
    """A head's scored tokens in float64, and what the kernels should say of them."""

    def __init__(self, z, sd, base, exact_lse):
        self.z, self.sd, self.base, self.exact_lse = z, sd, base, exact_lse
        self.debiased = z - sd**2 / 2
        self.depth = 8 * (base - self.debiased)
        self.bin = np.clip(np.floor(self.depth), 0, 255).astype(int)

    def check_bytes(self, bytes_):
        depth = self.depth - 8 * self.sd**2
        want = np.clip(np.floor(depth), 0, 255)
        near = np.abs(depth - np.round(depth)) < 0.5 / 256 + 2e-3
        assert np.all((bytes_ == want) | (near & (np.abs(bytes_ - want) <= 1)))

    def check_counts(self, counted):
        want = np.bincount(self.bin, minlength=256)
        near = np.bincount(self.bin[np.abs(self.depth - np.round(self.depth)) < 0.5 / 256 + 2e-3], minlength=257)[:256]
        slack = near + np.roll(near, 1) + np.roll(near, -1)
        assert np.all(np.abs(counted[:, 1] - want) <= slack)
        # Bins 0 and 255 take whatever lies beyond them: their places say nothing.
        places = np.bincount(self.bin, self.depth - self.bin, minlength=256)
        within = slice(1, 255)
        assert np.all(np.abs(counted[:, 0] / 256 - places)[within] <= (1e-2 + 3e-3 * want + slack)[within])

    def check_limits(self, limits, rule, noise, exact):
        got_noise, peak, base, kept, depth, below, total, _ = limits
        assert got_noise == pytest.approx(noise) and base == self.base and 1 <= kept <= 256 and kept == int(kept)
        if exact:
            assert peak == base
        weight = np.exp(self.debiased - peak)
        all_mass = weight.sum() + np.exp(min(self.exact_lse - peak, 60))
        # Tokens above the bins are counted with what they hold at least.
        assert total <= all_mass * (1 + 2e-3) + 1e-6
        if exact:
            assert total == pytest.approx(all_mass, rel=2e-3, abs=1e-6)
        elif len(weight):
            assert total >= weight.max() * (1 - 2e-3)
        below_at = lambda n: weight[self.bin >= n].sum()  # noqa: E731
        near = np.abs(self.depth - kept) < 0.5 / 256 + 2e-3
        assert below == pytest.approx(below_at(kept), rel=4e-3, abs=1.2 * weight[near].sum() + 1e-6 * total)
        if rule.left_out == 0:
            assert kept == 256 and below == 0
            return
        budget, k = rule.left_out * total, K * rule.certified

        def bound(n, slack):
            """With the tokens next to an edge on one side of it, or on the other."""
            below = self.depth >= n + slack
            return (1 + SHARED * k) * weight[below].sum() + k * np.sqrt((weight[below] ** 2).sum())

        assert bound(kept, 4e-3) <= budget * 1.01
        assert kept == 1 or bound(kept - 1, -4e-3) >= budget * 0.99
        if rule.certified:
            single = np.log(max(budget - below, LEAST_SINGLE * budget)) + peak
            assert depth == pytest.approx(8 * (base - single), abs=2e-2)
        else:
            largest = self.sd.max(initial=0.0)
            largest = min(largest, K)
            assert depth == pytest.approx(kept - 1 - 8 * (K * largest - largest**2 / 2), abs=2e-2)


CASES = [
    (Shape(2, 2, 4, 1024, 128), True, 1.03, 1.0),
    (Shape(1, 2, 5, 512, 64), True, -3.0, 1.0),
    (Shape(1, 1, 1, 1536, 128), False, 1.03, 6.0),
    (Shape(3, 1, 2, 2560, 128), False, -3.0, 0.5),
]


@pytest.mark.parametrize("case,top_p", list(zip(CASES, (0.3, 0.999, 0.999, 0.3), strict=True)), ids=str)
def test_selection_in_an_emulator(case, top_p, monkeypatch):
    """Deviations up to 12 nats; scores above the bins; one pass a block."""
    shape, certified, offset, largest = case
    emulate(monkeypatch)
    check_selection(
        shape, certified=certified, top_p=top_p, offset=offset, largest=largest, bias=shape.group == 4
    )  # fmt: skip


def test_largest_scale_is_that_of_a_scored_token_in_an_emulator(monkeypatch):
    """Two scales are a word, of which one alone may be scored."""
    emulate(monkeypatch)
    shape = Shape(1, 1, 2, 512, 128)
    levels, bits, gain, scale, *rest = inputs(shape)
    base, length = jnp.zeros((1, 1, 2)), jnp.array([500])
    for large, want in ((FIRST, 0.5), (FIRST + 1, 8.0), (447, 8.0), (448, 0.5)):
        scale = jnp.full_like(scale, 0.5).at[..., large].set(8)
        *_, (_, _, limits) = select(
            shape, (levels, bits, gain, scale, *rest), noise_of(shape, 1.0), base, base, jnp.array([448]), length,
            rule(0.9, True), sink=FIRST + 1,
        )  # fmt: skip
        np.testing.assert_array_equal(limits[..., :2, 7], want)


def test_selection_of_everything_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    check_selection(Shape(1, 2, 5, 512, 64), certified=True, top_p=1.0)


def test_selection_of_several_passes_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(mosaic_compact, "NOISY_BLOCKS", 4)
    shape = Shape(2, 1, 3, 10240, 128)
    assert mosaic_compact.passes_of(2, shape.tokens, noisy=True) > 1
    check_selection(shape, certified=True)


def check_again(shape, jit=lambda run: run):
    """Lists by limits that are given, in some of the kv heads."""
    bins, _, (_, _, limits) = check_selection(shape, certified=True, jit=jit)
    limits = limits.at[..., 3].add(9).at[..., 4].add(3)
    check_lists_by_limits(shape, bins, limits, inputs(shape)[3], jit=jit)


def check_lists_by_limits(shape, bins, limits, scale, jit=lambda run: run):
    """Against the definition, in float64; returns the shares of scored tokens that are kept."""
    quantized, length = ranges(shape)
    rows = np.arange(shape.batch * shape.kv_heads).reshape(shape.batch, shape.kv_heads) % 3 != 1
    # One head of a kv head that is short is enough.
    short = jnp.zeros(limits.shape[:3], jnp.int32).at[:, :, shape.group - 1].set(rows)
    again = jit(lambda *arrays: mosaic_certified.select_again(*arrays, quantized, length, sink=FIRST, deviations=K))
    indices, counts = again(bins, limits, short, scale)
    bytes_, noise, limits = np.asarray(bytes_of(bins)), np.asarray(limits)[..., 0], np.asarray(limits)
    position, shares = np.arange(shape.tokens), []
    for b, k in np.ndindex(rows.shape):
        if not rows[b, k]:
            assert counts[b, k] == 0
            continue
        scored = (position >= FIRST) & (position < int(quantized[b]))
        least, most = (np.zeros(shape.tokens, bool) for _ in range(2))
        for g in range(shape.group):
            sd = noise[b, k, g] * np.asarray(scale, np.float64)[b, k]
            deepest = limits[b, k, g, 4] + 8 * K * sd - 4 * sd**2
            for union, slack in ((least, -1e-2), (most, 1e-2)):
                union |= bytes_[b, k, g] < limits[b, k, g, 3]
                union |= bytes_[b, k, g] <= np.floor(np.clip(deepest + slack, 0, 255))
        chosen = np.zeros(shape.tokens, bool)
        chosen[np.asarray(indices[b, k, : counts[b, k]])] = True
        held = ~scored & (position < int(length[b]))
        assert np.all(chosen >= (least & scored | held)) and np.all(chosen <= (most & scored | held))
        if scored.any():
            shares.append(chosen[scored].mean())
    return shares


def test_selection_by_limits_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    check_again(Shape(2, 2, 4, 1024, 128))


def check_many_candidates(shape, jit=lambda run: run):
    """Lists of tokens whose scales decide, most of them in some threads' passes, and few or none in others'."""
    rng = np.random.default_rng(4)
    heads, tokens = (shape.batch, shape.kv_heads, shape.group), shape.tokens
    bytes_ = rng.integers(1, 44, (*heads, tokens)).astype(np.uint8)
    few = np.repeat(rng.random(tokens // 16) < 0.5, 16) & (rng.random(tokens) < 0.95)
    bytes_[..., few] = 255
    noise, depth = (jnp.asarray(rng.uniform(*x, heads), jnp.float32) for x in ((0.3, 1.2), (-15, 0)))
    limits = jnp.zeros((*heads, 8)).at[..., 0].set(noise).at[..., 3].set(1).at[..., 4].set(depth).at[..., 7].set(2)
    scale = jnp.asarray(rng.uniform(0.1, 2, (*heads[:2], tokens)), jnp.bfloat16)
    shares = check_lists_by_limits(shape, words_of(jnp.asarray(bytes_)), padded(limits), scale, jit=jit)
    # None is kept in any case.
    assert shares and all(0.1 < share < 0.5 for share in shares)


@pytest.mark.parametrize(
    "shape,passes", [(Shape(2, 2, 3, 10240, 128), 3), (Shape(1, 2, 5, 2560, 64), 1), (Shape(1, 1, 1, 16384, 64), 8)]
)  # fmt: skip
def test_many_candidates_in_an_emulator(shape, passes, monkeypatch):
    """One pass a block and several; a block that ends past the capacity."""
    emulate(monkeypatch)
    monkeypatch.setattr(mosaic_compact, "GIVEN_PASSES", passes)
    check_many_candidates(shape)


def sums_of_lists(partial, heads):
    """Sums [B,K,G,KINDS] of all parts of each list, none of which is empty."""
    ends, *_, sums = map(np.asarray, partial)
    whole = np.stack([sums[first : last + 1].sum(0) for first, last in ends])
    return whole.reshape(*heads[:2], *whole.shape[1:])[:, :, : heads[2]]


def check_verified_attention(shape, kept_share=0.2):
    """Output, masses and sums of the kernel on bins, in float64 over each query head's own tokens."""
    rng = np.random.default_rng(2)
    heads, tokens, dim = (shape.batch, shape.kv_heads, shape.group), shape.tokens, shape.head_dim
    arrays = [jnp.asarray(rng.normal(size=(*heads[:2], n, dim)), jnp.bfloat16) for n in (heads[2], tokens, tokens)]
    query, keys, values = (np.asarray(x, np.float64) for x in arrays)
    true = np.einsum("bkgd,bktd->bkgt", query, keys) * dim**-0.5
    scale = jnp.asarray(rng.uniform(0.5, 2, (*heads[:2], tokens)), jnp.bfloat16)
    noise = rng.uniform(0.3, 1.0, heads)
    sd = noise[..., None] * np.asarray(scale, np.float64)[:, :, None]
    z = true + sd * rng.normal(size=true.shape)
    base = np.quantile(z, 0.999, axis=-1)
    raised = z + sd**2 / 2
    bins = np.clip(np.floor(8 * (base[..., None] - raised)), 0, 255).astype(np.uint8)
    kept = np.floor(8 * (base - np.quantile(raised, 1 - kept_share, axis=-1)))
    depth = kept - 8 * (K * noise - noise**2 / 2) * rng.choice([0.9, 10], heads)
    peak = base + rng.normal(size=heads)
    limits = np.stack([noise, peak, base, kept, depth, *[0 * kept] * 3], axis=-1)
    quantized = np.array([tokens - 64 - 32 * b for b in range(heads[0])])
    counts = np.full(heads[:2], tokens // 3)
    indices = np.sort(np.stack([rng.permutation(tokens) for _ in range(counts.size)])[:, : tokens // 3], axis=-1)
    indices = indices.reshape(*heads[:2], -1)
    listed = jnp.asarray(np.pad(indices, [(0, 0)] * 2 + [(0, tokens - indices.shape[-1])]), jnp.int32)
    out, summary, _, _, partial = mosaic_certified.attend(
        *arrays, listed, jnp.asarray(counts, jnp.int32), words_of(jnp.asarray(bins)), scale,
        jnp.asarray(quantized, jnp.int32), padded(jnp.asarray(limits, jnp.float32)), jax.new_ref(zeros(shape)),
        softmax_scale=dim**-0.5, sink=FIRST, rule=rule(0.9, True), dtype=jnp.float32,
    )  # fmt: skip
    sums = sums_of_lists(partial, heads)
    for at in np.ndindex(heads):
        token = indices[at[:2]]
        s, d, byte = true[at][token], sd[at][token], bins[at][token]
        scored = (token >= FIRST) & (token < quantized[at[0]])
        mine = np.maximum(kept[at], np.floor(np.clip(depth[at] + 8 * K * d - 4 * d**2, 0, 255)) + 1)
        own, weight = scored & (byte < mine), np.exp(s - peak[at])
        np.testing.assert_allclose(
            out[at], np.exp(s) @ values[at[:2]][token] / np.exp(s).sum(), atol=1e-2, err_msg="output"
        )
        threshold = base[at] - mine / 8 - d**2 / 2
        middle = np.where(byte == 0, np.inf, base[at] - (byte + 0.5) / 8 - d**2 / 2)
        tau = np.clip((threshold - s) / d, -12, 12)
        h0, h1, h2 = (np.exp(norm.logcdf(tau - j * d) - norm.logcdf(-tau)) for j in range(3))
        missed = weight * (h0 - h1)
        variance = missed**2 + np.maximum(weight**2 * (h0 - 2 * h1 + np.exp(d**2) * h2), 0)
        near = own & (tau > -6)
        sure = near & (tau < 0.5) & (byte > 0)
        hazard = np.exp(-(tau**2) / 2 - norm.logcdf(-tau)) / np.sqrt(2 * np.pi)
        below = own & (middle - d**2 / 2 < base[at] - kept[at] / 8)
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
        np.testing.assert_allclose(summary[at][jnp.array([0, 1, 6, 7])], [*want[:2], own.sum(), len(token)], rtol=5e-3)


@pytest.mark.parametrize(
    "shape",
    [Shape(2, 2, 4, 640, 32), Shape(1, 2, 1, 512, 64), Shape(1, 1, 5, 1536, 16), Shape(1, 1, 11, 512, 80)],
    ids=str,
)
def test_verified_attention_on_bins_in_an_emulator(shape, monkeypatch):
    emulate(monkeypatch)
    check_verified_attention(shape)


def test_normal_distribution_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    # A number for each thread.
    x = np.linspace(-12, 12, 128, dtype=np.float32)
    np.testing.assert_allclose(mosaic_found.normal_cdf(x), norm.cdf(x.astype(np.float64)), rtol=2e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")
@pytest.mark.parametrize("certified", [False, True])
def test_kernels_lower(certified, monkeypatch):
    shape = Shape(2, 2, 5, 1024, 128)
    arguments, noise = inputs(shape), noise_of(shape, 1.0)
    quantized, length = ranges(shape)
    heads = jnp.zeros(noise.shape)

    def run(front, shift, noise, heads):
        bins, state, (indices, counts, limits) = select(
            shape, (*front, arguments[5], shift), noise, heads, heads, quantized, length, rule(0.9, certified)
        )
        again = mosaic_certified.select_again(
            bins, limits, heads.astype(jnp.int32), front[3], quantized, length, sink=FIRST, deviations=K
        )  # fmt: skip
        return indices, again, state

    text = kernel_text(monkeypatch, run, arguments[:5], arguments[6], noise, heads)
    assert "score_bins" in text and "compact" in text


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and JAX 0.11")
class TestOnHopper:
    @pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
    @pytest.mark.parametrize(
        "shape,certified,offset,largest",
        [
            *CASES,
            (Shape(1, 8, 4, 131072, 128), True, 1.03, 1.0),
            (Shape(1, 2, 16, 3072, 384), True, -3.0, 1.0),
            (Shape(3, 8, 4, 131072, 128), True, 1.03, 1.0),
        ],
        ids=str,
    )
    def test_selection(self, shape, certified, offset, largest, top_p):
        check_selection(shape, certified=certified, top_p=top_p, offset=offset, largest=largest, jit=jax.jit)

    def test_selection_by_limits(self):
        check_again(Shape(2, 8, 4, 10240, 128), jit=jax.jit)

    @pytest.mark.parametrize("passes", [1, 2, 6])
    def test_many_candidates(self, passes, monkeypatch):
        monkeypatch.setattr(mosaic_compact, "GIVEN_PASSES", passes)
        check_many_candidates(Shape(2, 8, 4, 32768, 128), jit=jax.jit)

    @pytest.mark.parametrize("shape", [Shape(1, 8, 4, 32768, 128), Shape(2, 2, 16, 2048, 64)], ids=str)
    def test_verified_attention(self, shape):
        check_verified_attention(shape, kept_share=0.05)
