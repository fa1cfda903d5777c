"""Divergences between teacher p and student q, on `Full` and `TopKTarget` (K kept ids + one tail bucket).

Each takes logits float32 [N,V] and returns float32 [N]. `outcomes` says which outcomes are compared. KL(a||b) = sum a
log(a/b). `temperature` tau divides both sides' logits and multiplies the divergence by tau^2, so that the size of the
gradient does not depend on it (Hinton et al. 2015, section 2.1); with a `TopKTarget` it needs a rule for the tail,
`temper` (`tempering`). All are f-divergences: on K + 1 outcomes, at temperature 1, they are lower bounds of the full
ones. Only forward KL can be had from a `SampledTarget`.
"""

from typing import Any

import jax.numpy as jnp

from distill_jax.losses.rows.outcomes import drawn, outcomes
from distill_jax.losses.rows.tempering import Temper
from distill_jax.losses.rows.vocabulary import over_outcomes, reads, total
from distill_jax.losses.targets import Full, SampledTarget, Target, TopKTarget

Array = Any


@reads(Full, TopKTarget, SampledTarget)
def forward_kl(logits: Array, target: Target, *, temperature: float = 1.0, temper: Temper = "exact") -> Array:
    """KL(teacher || student) * tau^2: mode covering. The loss of Hinton et al. 2015 up to the teacher's entropy.

    For a `SampledTarget` it is KL(w || student), w the shares of the draws (Random Sampling KD, 2503.16870): its
    gradient is an unbiased estimate of forward KL's, its value too large by H(p) - H(w), which is not negative on
    average and has no gradient. Raises ValueError for a temperature there.
    """
    if isinstance(target, SampledTarget) and isinstance(temperature, int | float) and temperature == 1:
        log_q, w = drawn(logits, target)
        return jnp.sum(jnp.where(w > 0, w * (jnp.log(jnp.where(w > 0, w, 1.0)) - log_q), 0.0), axis=-1)
    log_q, log_p = outcomes(logits, target, temperature, temper)
    return temperature**2 * _kl(log_p, log_q, target)


@reads(Full, TopKTarget)
def reverse_kl(logits: Array, target: Target, *, temperature: float = 1.0, temper: Temper = "exact") -> Array:
    """KL(student || teacher) * tau^2: mode seeking (MiniLLM, Gu et al. 2024, eq. 1, per token)."""
    log_q, log_p = outcomes(logits, target, temperature, temper)
    return temperature**2 * _kl(log_q, log_p, target)


@reads(Full, TopKTarget)
def generalized_jsd(logits: Array, target: Target, *, beta: float = 0.5, temperature: float = 1.0,
                    temper: Temper = "exact", normalize: bool = False) -> Array:
    """beta KL(p || m) + (1-beta) KL(q || m), m = beta p + (1-beta) q, p teacher, q student, times tau^2.

    Agarwal et al. 2024 (GKD), eq. 1. As beta -> 0 this goes to 0 as beta KL(p||q), as beta -> 1 as (1-beta) KL(q||p);
    so beta = 0 *is* defined as forward KL(teacher||student) and beta = 1 as reverse KL(student||teacher), a jump that
    the field has agreed on. `normalize` divides by beta (1-beta), which makes the family continuous in beta (and four
    times the Jensen-Shannon divergence at 1/2). Raises ValueError for beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"generalized_jsd needs 0 <= beta <= 1 (0 forward KL, 1 reverse KL), got {beta}")
    if beta == 0.0:
        return forward_kl(logits, target, temperature=temperature, temper=temper)
    if beta == 1.0:
        return reverse_kl(logits, target, temperature=temperature, temper=temper)
    log_q, log_p = outcomes(logits, target, temperature, temper)
    log_m = _mixture(beta, log_p, log_q)
    factor = temperature**2 / (beta * (1.0 - beta) if normalize else 1.0)
    return factor * (beta * _kl(log_p, log_m, target) + (1.0 - beta) * _kl(log_q, log_m, target))


@reads(Full, TopKTarget)
def skew_forward_kl(logits: Array, target: Target, *, alpha: float | Array = 0.1, temperature: float = 1.0,
                    temper: Temper = "exact") -> Array:
    """KL(p || alpha p + (1-alpha) q) * tau^2, p teacher, q student: forward KL that is at most -log alpha.

    DistiLLM (Ko et al. 2024, 2402.03898), alpha 0.1. alpha = 0 is forward KL; it may be a schedule. Raises
    ValueError for a number outside [0, 1).
    """
    _check_alpha(alpha)
    log_q, log_p = outcomes(logits, target, temperature, temper)
    return temperature**2 * _kl(log_p, _mixture(alpha, log_p, log_q), target)


@reads(Full, TopKTarget)
def skew_reverse_kl(logits: Array, target: Target, *, alpha: float | Array = 0.1, temperature: float = 1.0,
                    temper: Temper = "exact") -> Array:
    """KL(q || (1-alpha) p + alpha q) * tau^2, p teacher, q student: reverse KL that is at most -log alpha.

    DistiLLM (Ko et al. 2024, 2402.03898), alpha 0.1. alpha = 0 is reverse KL; it may be a schedule. Raises
    ValueError for a number outside [0, 1).
    """
    _check_alpha(alpha)
    log_q, log_p = outcomes(logits, target, temperature, temper)
    return temperature**2 * _kl(log_q, _mixture(alpha, log_q, log_p), target)


@reads(Full, TopKTarget)
def total_variation(logits: Array, target: Target) -> Array:
    """1/2 sum_v |p(v) - q(v)|, p teacher, q student, in [0, 1] (f-distill, Wen et al. 2023, 2307.15190).

    The gradient is that of the sign, so it does not fade as q nears p, and is 0 where they are equal.
    """
    log_q, log_p = outcomes(logits, target)
    return 0.5 * total(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), over_outcomes(target))


def _kl(log_a: Array, log_b: Array, target: Target) -> Array:
    return total(jnp.exp(log_a) * (log_a - log_b), over_outcomes(target))


def _mixture(share: Any, log_a: Array, log_b: Array) -> Array:
    """log(share a + (1 - share) b), share a number or a traced scalar in [0, 1).

    Where it is a number above 0, the exponentials are those that the KL takes anyway; what underflows there has no
    weight in either KL of the mixture. At share 0, where b alone stands below, no digit may be lost.
    """
    if isinstance(share, int | float) and share > 0:
        mixed = share * jnp.exp(log_a) + (1.0 - share) * jnp.exp(log_b)
        return jnp.log(jnp.maximum(mixed, jnp.finfo(mixed.dtype).tiny))
    share = jnp.asarray(share, log_a.dtype)
    return jnp.logaddexp(log_a + jnp.log(share), log_b + jnp.log1p(-share))


def _check_alpha(alpha: Any) -> None:
    if isinstance(alpha, int | float) and not 0.0 <= alpha < 1.0:
        raise ValueError(f"a skew KL needs 0 <= alpha < 1 (0 is the plain KL, 1 compares nothing), got {alpha}")
