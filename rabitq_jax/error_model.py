"""The error of an estimated logit, in closed form, from what is stored (docs/theory.md, section 2).

Over rotation and rounding, the estimated minus the true scaled logit of a key and a query is nearly normal with mean
zero, and a standard deviation that is one number a query head times the token's stored `scale`:

    sd   = noise * scale
    noise^2 = softmax_scale^2 D ((1 - F) |q - c_q|^2 / (D - 1) + step^2 / 6),   F = 2/pi + (1 - 2/pi) / D        (2)

D is the dimension of the codes. The first term is the angle that the key's signs do not know: F is the mean of
(|x|_1^2 / (D |x|_2^2)), the squared cosine between a random direction and its signs. The second is the query's random
rounding, of variance step^2 / 6 a coordinate; nearest rounding has step^2 / 12.
"""

import math

import jax
import jax.numpy as jnp

from rabitq_jax.codes import KeyCodes
from rabitq_jax.config import QueryRounding

SIGN_COSINE2 = 2 / math.pi
ROUNDING_VARIANCE = {"random": 1 / 6, "nearest": 1 / 12}


def noise_gain(
    query: jax.Array, step: jax.Array, codes: KeyCodes, *, softmax_scale: float, rounding: QueryRounding
) -> jax.Array:
    """`noise` of equation (2).

    Args:
      query: [B,K,G,D], exact.
      step: float32 [B,K,G], of the same in INT4 (`Int4Query.step`).
      codes: whose rotation and query centroid the estimates are made with.
      softmax_scale: factor from <q, k> to a logit.
      rounding: how the query was rounded.

    Returns:
      float32 [B,K,G], in nats for each unit of `scale`.
    """
    of_norm, of_step = noise_gains(codes.rotation.shape[0], softmax_scale, rounding)
    centred = query.astype(jnp.float32)
    if codes.query_centroid is not None:
        centred = centred - codes.query_centroid[:, :, None]
    return jnp.sqrt(of_norm * jnp.sum(centred * centred, axis=-1) + of_step * step**2)


def noise_gains(size: int, softmax_scale: float, rounding: QueryRounding) -> tuple[float, float]:
    """The factors of |q - c_q|^2 and of step^2 in the square of `noise`, for codes of `size` dimensions."""
    cosine2 = SIGN_COSINE2 + (1 - SIGN_COSINE2) / size
    variance = softmax_scale**2 * size
    return variance * (1 - cosine2) / (size - 1), variance * ROUNDING_VARIANCE[rounding]


def error_bound(noise: jax.Array, scale: jax.Array, eps0: float = 1.9) -> jax.Array:
    """eps0 standard deviations of each logit's error, in nats: float32 [B,K,G,T].

    The error is within it with the probability that a normal number is within eps0 deviations: 0.943 for 1.9, and
    for eps0 = sqrt(2 ln(2 T / f)) all T tokens at once with probability 1 - f at least.

    Args:
      noise: float32 [B,K,G], `noise_gain`.
      scale: [B,K,T], `KeyCodes.scale`.
    """
    return eps0 * noise[..., None] * scale[:, :, None].astype(jnp.float32)
