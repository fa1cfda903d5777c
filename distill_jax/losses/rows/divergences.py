"""Divergences between teacher p and student q, on `Full` and `TopKTarget` (K kept ids + one tail bucket).

Each takes logits float32 [N,V] and returns float32 [N]. `outcomes` says which outcomes are compared. KL(a||b) = sum
a log(a/b). `temperature` tau (only for `Full` targets) divides both sides' logits and multiplies the divergence by
tau^2, so that the size of the gradient does not depend on it (Hinton et al. 2015, section 2.1).
"""

import math
from typing import Any

import jax.numpy as jnp

from distill_jax.losses.rows.outcomes import outcomes
from distill_jax.losses.targets import Target

Array = Any


def forward_kl(logits: Array, target: Target, *, temperature: float = 1.0) -> Array:
    """KL(teacher || student) * tau^2: mode covering. The loss of Hinton et al. 2015 up to the teacher's entropy."""
    log_q, log_p = outcomes(logits, target, temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def reverse_kl(logits: Array, target: Target, *, temperature: float = 1.0) -> Array:
    """KL(student || teacher) * tau^2: mode seeking (MiniLLM, Gu et al. 2024, eq. 1, per token)."""
    log_q, log_p = outcomes(logits, target, temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def generalized_jsd(logits: Array, target: Target, *, beta: float = 0.5, temperature: float = 1.0,
                    normalize: bool = False) -> Array:
    """beta KL(p || m) + (1-beta) KL(q || m), m = beta p + (1-beta) q, p teacher, q student, times tau^2.

    Agarwal et al. 2024 (GKD), eq. 1. As beta -> 0 this goes to 0 as beta KL(p||q), as beta -> 1 as (1-beta) KL(q||p);
    so beta = 0 *is* defined as forward KL(teacher||student) and beta = 1 as reverse KL(student||teacher), a jump that
    the field has agreed on. `normalize` divides by beta (1-beta), which makes the family continuous in beta (and four
    times the Jensen-Shannon divergence at 1/2). Raises ValueError for beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"generalized_jsd needs 0 <= beta <= 1 (0 forward KL, 1 reverse KL), got {beta}")
    if beta == 0.0:
        return forward_kl(logits, target, temperature=temperature)
    if beta == 1.0:
        return reverse_kl(logits, target, temperature=temperature)
    log_q, log_p = outcomes(logits, target, temperature)
    log_m = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    out = beta * jnp.exp(log_p) * (log_p - log_m) + (1.0 - beta) * jnp.exp(log_q) * (log_q - log_m)
    factor = temperature**2 / (beta * (1.0 - beta) if normalize else 1.0)
    return factor * jnp.sum(out, axis=-1)
