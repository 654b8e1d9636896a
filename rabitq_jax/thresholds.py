"""Thresholds that hold a share of the true mass, found among noisy logits (docs/theory.md, sections 3 and 5).

With z a token's estimated logit, s its true one, and z - s normal with mean 0 and deviation sd, for any threshold t

    E[ e^s 1(z + sd^2 / 2 < t) ]  =  E[ e^(z - sd^2 / 2) 1(z - sd^2 / 2 < t) ]                             (3)

without any assumption on how the true logits are spread. So a token counts with its debiased logit z - sd^2 / 2, both
as its weight and as its place in the order in which the threshold is found; what is kept are the tokens with
z + sd^2 / 2 >= t. C1(t) and C2(t) below are sums of weights, and of their squares, over the scored tokens with debiased
logits below t. Thresholds lie on a grid of 1/8 nat.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import debiased_mass
from rabitq_jax._dispatch import select

GRID = 1 / 8
STEPS = 1024
# Deviation of the left-out mass that is common to all tokens, as a share of it: measured (docs/theory.md, section 4).
SHARED = 0.085
# Least share of the mass to be left out that a single unseen token may hold.
LEAST_SINGLE = 0.1
# Certified selection plans to leave out this share of the mass that it may. Verification has noise of its own: with
# nothing in hand, one head in fifty goes into a second round, which costs more than the tokens, and as often as not is
# still not shown to hold p after it.
PLANNED = 0.7
# Deviations below this are bfloat16's rounding, not the code's: a key at its block's centroid has scale 0.
LEAST_DEVIATION = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyLogits:
    """Estimated logits with the size of their error.

    Attributes:
      scores: float32 [B,K,G,T], estimated scaled logits; undefined outside [sink, quantized).
      noise: float32 [B,K,G], `error_model.noise_gain`.
      scale: bfloat16 [B,K,T].
      quantized: int32 [B].
      sink: int.
    """

    scores: jax.Array
    noise: jax.Array
    scale: jax.Array
    quantized: jax.Array
    sink: int = dataclasses.field(metadata={"static": True})

    @property
    def scored(self) -> jax.Array:
        """bool [B,1,1,T]: tokens in [sink, quantized)."""
        position = jnp.arange(self.scores.shape[-1])
        return ((position >= self.sink) & (position < self.quantized[:, None]))[:, None, None]

    @property
    def deviation(self) -> jax.Array:
        """float32 [B,K,G,T]: sd."""
        return deviation_of(self.noise[..., None], self.scale[:, :, None])


def deviation_of(noise, scale):
    """sd of tokens with this `scale` (bfloat16), in nats."""
    return jnp.maximum(noise * scale.astype(jnp.float32), LEAST_DEVIATION)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadMass:
    """Estimated masses of a query head, in units of e^peak; float32 [B,K,G] each.

    Attributes:
      peak: the largest of the debiased logits and of the exact tokens' log-sum-exp.
      total: of all tokens, exact ones included.
      mean_deviation: root of the mean of the scored tokens' sd^2.
    """

    peak: jax.Array
    total: jax.Array
    mean_deviation: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredMass(HeadMass):
    """HeadMass of scores, and what a search among them begins with; float32 [B,K,G] each.

    Attributes:
      top: the largest debiased logit, where the grid begins.
      largest_deviation: of the scored tokens' sd.
    """

    top: jax.Array
    largest_deviation: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """A scored token is kept iff z + sd^2 / 2 >= bulk or z + deviations sd >= single, or z is not finite.

    The second rule bounds what one unseen token may hold: e^single, but with the probability of an error of
    `deviations` standard deviations.

    Attributes:
      bulk, single: float32 [B,K,G].
      deviations: float.
    """

    bulk: jax.Array
    single: jax.Array
    deviations: float = dataclasses.field(metadata={"static": True})


def threshold_of(bulk, single, deviations: float, sd):
    """A token's own threshold on z."""
    return jnp.minimum(bulk - sd**2 / 2, single - deviations * sd)


def largest_excess(largest_deviation, deviations: float):
    """How far above the bulk's threshold true logits of tokens below it may be, at so many deviations."""
    # The largest k sd - sd^2 / 2.
    sd = jnp.minimum(largest_deviation, deviations)
    return sd * (deviations - sd / 2)


def confidence(failure_rate: float) -> float:
    """Deviations k that four ways to fail have each with probability failure_rate / 4: the mass left out is larger than
    its upper bound, or one unseen token is, in either of two rounds."""
    return -statistics.NormalDist().inv_cdf(failure_rate / 4)


def left_out(top_p: float, *, certified: bool) -> float:
    """Share of the mass that thresholds plan to leave out."""
    return (1 - top_p) * (PLANNED if certified else 1.0)


def measure_masses(noisy: NoisyLogits, exact_lse: jax.Array) -> ScoredMass:
    """What a head's estimates add up to.

    Args:
      exact_lse: float32 [B,K,G], log-sum-exp of the exact tokens; -inf for a share of the scored tokens alone.
    """
    sd = noisy.deviation
    usable = noisy.scored & jnp.isfinite(noisy.scores) & jnp.isfinite(sd)
    debiased = jnp.where(usable, noisy.scores - sd**2 / 2, -jnp.inf)
    top = jnp.max(debiased, axis=-1)
    peak = jnp.maximum(top, exact_lse)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    count = jnp.maximum(noisy.quantized - noisy.sink, 1)[:, None, None]
    return ScoredMass(
        peak=peak,
        total=jnp.exp(exact_lse - peak) + jnp.sum(jnp.exp(debiased - peak[..., None]), axis=-1),
        top=jnp.where(jnp.isfinite(top), top, 0.0),
        largest_deviation=jnp.max(jnp.where(usable, sd, LEAST_DEVIATION), axis=-1),
        mean_deviation=jnp.sqrt(jnp.sum(jnp.where(usable, sd**2, 0), axis=-1) / count),
    )


def find_bulk_reference(noisy: NoisyLogits, mass: ScoredMass, budget, level, deviations: float):
    """`find_bulk` by bisection, with a sum over all tokens for each half: its definition."""
    sd = noisy.deviation
    usable = noisy.scored & jnp.isfinite(noisy.scores) & jnp.isfinite(sd)
    debiased = jnp.where(usable, noisy.scores - sd**2 / 2, -jnp.inf)
    weight = jnp.exp(debiased - mass.peak[..., None])

    def masses_below(threshold):
        under = jnp.where(debiased < threshold[..., None], weight, 0)[..., None, :]
        return jnp.sum(under, axis=-1), jnp.sum(under * under, axis=-1)

    return search_grid(lambda t: masses_below(t[..., 0]), mass.top, budget, level, deviations, ways=2)


def search_grid(masses_below, top, budget, level, deviations: float, *, ways: int):
    """`find_bulk`, given the masses below any thresholds, by splitting what is left of the grid in `ways` parts.

    Args:
      masses_below: float32 [B,K,G,ways - 1], thresholds -> C1 and C2 at each.
      top: where the grid begins.
      ways: a power of two with STEPS among its powers.
    """

    def narrow(i, state):
        low, below = state
        part = STEPS // ways ** (i + 1)
        step = low[..., None] + part * jnp.arange(1, ways) - 1
        first, second = masses_below(_threshold_at(step, top[..., None]))
        upper = upper_bound(first, second, level[..., None], deviations)
        parts = jnp.sum(~(upper <= budget[..., None]), axis=-1, dtype=jnp.int32)
        at_end = jnp.take_along_axis(first, jnp.minimum(parts, ways - 2)[..., None], axis=-1)[..., 0]
        return low + part * parts, jnp.where(parts == ways - 1, below, at_end)

    rounds = round(math.log(STEPS, ways))
    # The grid's last step keeps everything, so that nothing is below it.
    state = (jnp.zeros(top.shape, jnp.int32), jnp.zeros_like(top))
    # A few rounds need no loop, which costs a GPU more than they do.
    index, below = jax.lax.fori_loop(0, rounds, narrow, state, unroll=ways > 2)
    return jnp.where(index == STEPS - 1, -jnp.inf, _threshold_at(index, top)), below


def _threshold_at(step, top):
    return top - GRID * (step + 1).astype(jnp.float32)


def upper_bound(first, second, level, deviations: float):
    """What the left-out mass is at most, from C1 and C2: an error of its own and one that all tokens share; and no less
    than `level` times C1."""
    return jnp.maximum(level * first, (1 + SHARED * deviations) * first + deviations * jnp.sqrt(second))


def _find_bulk_pallas(noisy: NoisyLogits, mass: ScoredMass, budget, level, deviations: float):
    """32 parts in each of two passes over the scores."""

    def masses_below(thresholds):
        # A power of two for the kernel; nothing lies below minus infinity.
        padded = jnp.pad(thresholds, [(0, 0)] * 3 + [(0, 1)], constant_values=-jnp.inf)
        sums = debiased_mass.masses_below(
            noisy.scores, noisy.noise, noisy.scale, noisy.quantized, mass.peak, padded,
            sink=noisy.sink, least_deviation=LEAST_DEVIATION,
        )  # fmt: skip
        return tuple(x[..., :-1] for x in sums)

    return search_grid(masses_below, mass.top, budget, level, deviations, ways=32)


IMPLEMENTATIONS = {"xla": find_bulk_reference, "pallas": _find_bulk_pallas}


def find_bulk(noisy: NoisyLogits, mass: ScoredMass, budget, level, deviations: float, *, implementation=None):
    """The highest threshold on the grid under which a head's left-out mass fits a budget.

    Args:
      budget: float32 [B,K,G], in units of e^peak.
      level, deviations: of `upper_bound`, which is compared with the budget.
      implementation: "xla", "pallas" or None.

    Returns:
      The threshold, float32 [B,K,G], -inf to keep everything; and C1 at it.
    """
    find = select(IMPLEMENTATIONS, implementation, gpu="pallas")
    return find(noisy, mass, budget, level, deviations)


def debiased_thresholds(
    noisy: NoisyLogits, mass: ScoredMass, *, top_p: float, failure_rate: float, implementation=None
) -> tuple[Thresholds, jax.Array]:
    """Thresholds whose kept tokens hold top_p of the true mass on average; and C1 at them."""
    k = confidence(failure_rate)
    budget = left_out(top_p, certified=False) * mass.total
    bulk, below = find_bulk(noisy, mass, budget, 0 * budget, 0.0, implementation=implementation)
    if top_p == 1:
        bulk, below = jnp.full_like(bulk, -jnp.inf), 0 * below
    # Adds no token: it says what an unseen one may hold.
    return Thresholds(bulk=bulk, single=bulk + largest_excess(mass.largest_deviation, k), deviations=k), below


def certified_thresholds(
    noisy: NoisyLogits, mass: ScoredMass, *, top_p: float, failure_rate: float, implementation=None
) -> tuple[Thresholds, jax.Array]:
    """Thresholds whose kept tokens hold top_p of the true mass but with probability failure_rate, by the estimates
    alone; and C1 at them."""
    k = confidence(failure_rate)
    budget = left_out(top_p, certified=True) * mass.total
    bulk, below = find_bulk(noisy, mass, budget, 0 * budget, k, implementation=implementation)
    single = jnp.log(jnp.maximum(budget - below, LEAST_SINGLE * budget)) + mass.peak
    if top_p == 1:
        bulk, single, below = jnp.full_like(bulk, -jnp.inf), jnp.full_like(bulk, -jnp.inf), 0 * below
    return Thresholds(bulk=bulk, single=single, deviations=k), below


def extended_thresholds(
    find: Callable, mass: HeadMass, first: Thresholds, below, known, short, *, top_p: float
) -> tuple[Thresholds, jax.Array]:
    """The second round's thresholds, now that the mass of the kept tokens is known, and the level of the rest; and C1
    at them.

    Args:
      find: `find_bulk`, of a budget, a level and deviations.
      first, below: of the first round.
      known: the `certificate.Certificate` that it ended with.
      short: bool [B,K,G]; the other heads' thresholds stay.
    """
    k = first.deviations
    budget = left_out(top_p, certified=True) / top_p * known.attended
    others = jnp.maximum(known.attended - known.own, 0)
    before = jnp.maximum(below, 1e-30)
    bulk, new = find(budget + others, known.bulk / before, k)
    expected = jnp.maximum(new * jnp.maximum(known.rest / before, 1) - others, 0)
    single = jnp.log(jnp.maximum(budget - expected, LEAST_SINGLE * budget)) + mass.peak
    lower = lambda old, new: jnp.where(short, jnp.minimum(old, new), old)  # noqa: E731
    thresholds = Thresholds(bulk=lower(first.bulk, bulk), single=lower(first.single, single), deviations=k)
    return thresholds, jnp.where(short & (bulk < first.bulk), new, below)
