"""The alpha-beta divergence (ABKD): forward and reverse KL as two corners of a plane."""

from typing import Any

import jax.numpy as jnp

from distill_jax.losses.rows.outcomes import outcomes
from distill_jax.losses.rows.tempering import Temper
from distill_jax.losses.rows.vocabulary import over_outcomes, reads, total
from distill_jax.losses.targets import Full, Target, TopKTarget

Array = Any

_LEAST = 0.01  # below this exponent float32 differences of powers cancel


@reads(Full, TopKTarget)
def alpha_beta(logits: Array, target: Target, *, alpha: float = 0.2, beta: float = 0.7, temperature: float = 1.0,
               temper: Temper = "exact") -> Array:
    """-1/(alpha beta) sum_v [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta)].

    ABKD (Wang et al. 2025, 2505.04560); p teacher, q student, times tau^2. logits float32 [N,V] ->
    float32 [N]. (1, 0) is forward KL(p||q) and (0, 1) reverse KL(q||p), as limits; zero exponents are those limits
    throughout (the authors' code has 1/beta for 1/beta^2 there, another size unless the other exponent is 1). A larger
    alpha weighs the tokens with large errors less, a larger beta those the student is sure of more.

    Tail: on a `TopKTarget` this is the divergence of K kept ids and one tail bucket, zero only where they agree; an
    f-divergence, and so a lower bound of the full one, only for alpha + beta = 1. Raises ValueError for exponents that
    are negative, both 0, or so near 0 that float32 cancels.
    """
    if min(alpha, beta) < 0 or alpha + beta == 0 or any(0 < x < _LEAST for x in (alpha, beta)):
        raise ValueError(f"alpha_beta needs exponents that are 0 or at least {_LEAST}, not both 0, got alpha={alpha}, "
                         f"beta={beta}; (1, 0) is forward KL, (0, 1) reverse KL")
    log_q, log_p = outcomes(logits, target, temperature, temper)
    ours, theirs = (log_p, log_q) if alpha >= beta else (log_q, log_p)
    return temperature**2 * total(_terms(ours, theirs, max(alpha, beta), min(alpha, beta)), over_outcomes(target))


def _terms(log_a: Array, log_b: Array, x: float, y: float) -> Array:
    """The divergence with the larger exponent x on a and y on b: [(b^s - a^s)/s - (a^x b^y - a^s)/y] / x, s = x + y.

    Written so that y = 0 is its limit, (a^x b^y - a^s)/y -> a^x log(b/a).
    """
    s = x + y
    of_a = jnp.exp(s * log_a)
    inner = (jnp.exp(x * log_a + y * log_b) - of_a) / y if y else of_a * (log_b - log_a)
    return ((jnp.exp(s * log_b) - of_a) / s - inner) / x
