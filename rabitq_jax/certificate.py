"""What exact attention over a selection says of the mass outside it (docs/theory.md, section 4).

A scored token is found iff its noisy logit z reaches its own threshold t. Tokens that were not found count with their
debiased weights. A token that was found has shown its true logit s, and stands for the tokens like it that were not:
with tau = (t - s) / sd and H_j = Phi(tau - j sd) / Phi(-tau),

    rest      =  sum over not found of e^(z - sd^2 / 2)  +  sum over found of e^s (H_0 - H_1)              (4)
    variance  =  sum over found of e^(2 s) ((H_0 - H_1)^2 + H_0 - 2 H_1 + e^(sd^2) H_2)                    (5)

is free of bias, and the mean square of the error, for independent normal errors. No assumption is made on how the true
logits are spread.

The first sum of (4) is over nearly all tokens, but needs no pass over them. None that was not found has a debiased
logit z - sd^2 / 2 at or above the threshold of the bulk: the sum is C1 there, which the choice of the threshold knows,
less what found tokens have in it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from rabitq_jax.thresholds import SHARED, HeadMass, Thresholds

# Beyond so many deviations above its threshold, a token stands for none that was missed.
FAR = 6.0
# Tokens' worth of information that say: the errors found have nothing in common.
PRIOR_TOKENS = 4.0
# Logarithm of the largest mass, relative to the peak, that is told from an infinite one.
LARGEST_LOG = 60.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Sums over a query head's own scored tokens that were found; float32 [B,K,G] each.

    Attributes:
      missed: of e^s (H_0 - H_1), in units of e^peak.
      variance: equation (5), in units of e^(2 peak).
      information, score: of the shift that the found tokens' errors have in common, in standard deviations: the
        likelihood's curvature and slope at no shift, of normal errors cut off at the threshold.
      returned: what these tokens have in C1 at the threshold of the bulk, in units of e^peak.
      number: of tokens.
    """

    missed: jax.Array
    variance: jax.Array
    information: jax.Array
    score: jax.Array
    returned: jax.Array
    number: jax.Array


def found_terms(true, noisy, sd, threshold, bulk, peak):
    """A found token's terms of the sums in `Found`.

    Args:
      true, noisy: its true and its noisy scaled logit.
      sd, threshold: its deviation, and its threshold on the noisy logit.
      bulk: the threshold of all tokens.
      peak: of `HeadMass`.
    """
    tau = jnp.clip((threshold - true) / sd, -2 * FAR, 2 * FAR)
    log_found = log_ndtr(-tau)
    x = true - peak
    log_h0, log_h1, log_h2 = (log_ndtr(tau - j * sd) - log_found for j in range(3))
    missed = jnp.exp(x + log_h0) - jnp.exp(x + log_h1)
    spread = jnp.exp(2 * x + log_h0) - 2 * jnp.exp(2 * x + log_h1) + jnp.exp(2 * x + sd**2 + log_h2)
    near = tau > -FAR
    debiased = noisy - sd**2 / 2
    # The slope and the curvature of log Phi(-tau), where it is not the tail of what is cut off.
    hazard = jnp.exp(-(tau**2) / 2 - log_found) / math.sqrt(2 * math.pi)
    sure = near & (tau < 0.5)
    return Found(
        missed=jnp.where(near, missed, 0),
        variance=jnp.where(near, missed**2 + jnp.maximum(spread, 0), 0),
        information=jnp.where(sure, 1 + tau * hazard - hazard**2, 0),
        score=jnp.where(sure, (noisy - true) / sd - hazard, 0),
        returned=jnp.where(debiased < bulk, jnp.exp(debiased - peak), 0),
        number=jnp.ones_like(tau),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is known of each query head's captured mass; float32 [B,K,G] each.

    Masses are in units of e^peak (`HeadMass`), shares of all attention.

    Attributes:
      attended: mass of the tokens that its kv head attends.
      own: mass of the tokens that it selected itself, exact ones included.
      rest: equation (4), the mass outside its own.
      bulk: upper bound of it, but for a single token of great weight.
      verified: share of the attended, estimated without bias but for that of a ratio.
      bound: what the share is at least, with probability 1 - failure_rate.
    """

    attended: jax.Array
    own: jax.Array
    rest: jax.Array
    bulk: jax.Array
    verified: jax.Array
    bound: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """The result of attending to what limits keep.

    Attributes:
      out: [B,K,G,D], in float32 or the query's dtype.
      summary: float32 [B,K,G,8], `summarize` in one array, so that it takes little to pass it on.
    """

    out: jax.Array
    summary: jax.Array

    @property
    def certificate(self) -> Certificate:
        return Certificate(*(self.summary[..., i] for i in range(6)))

    @property
    def counts(self) -> jax.Array:
        """int32 [B,K], tokens attended."""
        return self.summary[:, :, 0, 7].astype(jnp.int32)

    @property
    def number(self) -> jax.Array:
        """float32 [B,K,G], scored tokens that the head selected itself."""
        return self.summary[..., 6]


def summarize(certificate: Certificate, found: Found, count) -> tuple[jax.Array, ...]:
    """The fields of a certificate, the number of the head's own tokens, and how many the kv head attends: float32 holds
    integers up to 2^24."""
    fields = (getattr(certificate, field.name) for field in dataclasses.fields(certificate))
    return *fields, found.number, count.astype(jnp.float32)


def certify(found: Found, below, attended, own, scored, mass: HeadMass, thresholds: Thresholds) -> Certificate:
    """The captured mass and its bound, O(1) a head.

    The total is at most own + (upper bound of the rest), whatever the heads' errors have to do with each other; so
    `attended` over it bounds the share of the union that the kv head attends.

    Args:
      below: float32 [B,K,G], C1 at the threshold of the bulk, in units of e^peak.
      attended, own: as in `Certificate`.
      scored: int32 [B,1,1], how many tokens were scored; a head that found as many left nothing out.
    """
    k = thresholds.deviations
    rest = jnp.maximum(below - found.returned, 0) + found.missed
    shift = found.score / (found.information + PRIOR_TOKENS) * mass.mean_deviation
    # Where the errors that are seen are low together, those that are not will be, too.
    bulk = (1 + SHARED * k) * rest * jnp.exp(jnp.maximum(-shift, 0)) + k * jnp.sqrt(found.variance)
    upper = jnp.maximum(bulk, rest + jnp.exp(jnp.minimum(thresholds.single - mass.peak, LARGEST_LOG)))
    complete = found.number >= scored
    outside = jnp.maximum(rest - jnp.maximum(attended - own, 0), 0)
    return Certificate(
        attended=attended,
        own=own,
        rest=rest,
        bulk=bulk,
        verified=jnp.where(complete, 1.0, attended / (attended + outside)),
        bound=jnp.where(complete, 1.0, jnp.minimum(attended / (own + upper), 1.0)),
    )
