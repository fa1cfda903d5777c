"""Cross-entropy against tokens or against a teacher's distribution."""

from typing import Any

import jax.numpy as jnp

from distill_jax.losses.rows.logprob import log_prob
from distill_jax.losses.rows.outcomes import drawn, outcomes
from distill_jax.losses.rows.vocabulary import over_outcomes, reads, total
from distill_jax.losses.targets import Full, Labels, SampledTarget, Target, TopKTarget

Array = Any


@reads(Labels, Full, TopKTarget, SampledTarget)
def cross_entropy(logits: Array, target: Target) -> Array:
    """-log q(y) for `Labels`; -sum_v p(v) log q(v) for a teacher's distribution p.

    logits float32 [N,V] -> float32 [N]. A teacher's target gives the gradient of forward KL; the value exceeds it by
    the teacher's entropy (over K kept ids and one tail bucket for a `TopKTarget`, see `outcomes`). From a
    `SampledTarget` value and gradient are unbiased estimates of those against the whole teacher.
    """
    if isinstance(target, Labels):
        return -log_prob(logits, target)
    if isinstance(target, SampledTarget):
        log_q, w = drawn(logits, target)
        return -jnp.sum(w * log_q, axis=-1)
    log_q, log_p = outcomes(logits, target)
    return -total(jnp.exp(log_p) * log_q, over_outcomes(target))
