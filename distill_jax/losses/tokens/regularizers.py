"""What stands beside a policy loss as a term of its own, with its own weight: KL, entropy, likelihood. [B,T]."""

from typing import Any, Literal

import jax.numpy as jnp

from distill_jax.losses.tokens.inputs import LIMIT, Tokens, local
from distill_jax.losses.tokens.ratios import ratio

Array = Any


@local
def kl(tokens: Tokens, *, estimator: Literal["k1", "k2", "k3"] = "k3", old: str = "") -> Array:
    """Estimate of the reverse KL(pi || reference) from the sampled tokens, with d = log pi - log reference: [B,T].

    k1 = d, k2 = d^2 / 2, k3 = e^-d + d - 1 (Schulman 2020, "Approximating KL divergence"; k3: DeepSeekMath,
    2402.03300, eq. 4). Values of k1 and k3 are unbiased on-policy; as losses, the gradient of k1 has mean zero, that
    of k2 is the reverse KL's, that of k3 the forward KL's.

    old  "": as written. Otherwise times the ratio to it, gradient included, which makes value and gradient of k1
         and k3 unbiased for the current policy (DeepSeek-V3.2, 2512.02556)
    """
    d = tokens.masked(tokens.logprobs - tokens.against)
    if estimator == "k1":
        value = d
    elif estimator == "k2":
        value = 0.5 * jnp.square(d)
    elif estimator == "k3":
        value = jnp.expm1(-jnp.maximum(d, -LIMIT)) + d
    else:
        raise ValueError(f"estimator {estimator!r}: expected k1, k2 or k3")
    return tokens.masked(value * ratio(tokens, old)) if old else tokens.masked(value)


@local
def negative_entropy(tokens: Tokens) -> Array:
    """-H(pi(. | context)) in nats at each token, of the whole distribution: [B,T]. The term's weight is the bonus."""
    return tokens.masked(-tokens.entropies)


@local
def negative_log_likelihood(tokens: Tokens) -> Array:
    """-log pi(t): [B,T]. Where the log-probs are computed for another term anyway (ORPO's likelihood of the chosen);
    `losses.rows.cross_entropy` costs less where they are not."""
    return tokens.masked(-tokens.logprobs)
