"""TAID: distil towards a target that moves from the student's own distribution to the teacher's."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.rows.outcomes import log_softmax, outcomes
from distill_jax.losses.rows.vocabulary import over_outcomes, reads, total
from distill_jax.losses.targets import Full, Target, TopKTarget

Array = Any


@reads(Full, TopKTarget)
def taid(logits: Array, target: Target, *, t: Array) -> Array:
    """-sum_v p_t(v) log q(v), p_t = softmax((1-t) sg[log q] + t log p), q student, p teacher.

    Shing et al. 2025 (2501.16937), eq. 3-4. logits float32 [N,V], t scalar in [0,1] (`TAIDSchedule`) -> float32 [N].
    At t = 0 the gradient is zero.

    Tail: for a `TopKTarget` the interpolation is over K kept ids and the tail bucket, (tail q)^(1-t) (tail p)^t. By
    Hoelder's inequality that is at least what the tail's tokens would have one by one, sum q^(1-t) p^t, and equal at
    t = 0, at t = 1, and where the two tails are proportional: between, the kept ids get rather too little.
    """
    log_q, log_p = outcomes(logits, target)
    t = jnp.asarray(t, log_q.dtype)
    mix = (1.0 - t) * jax.lax.stop_gradient(log_q) + t * log_p
    log_t = jax.lax.stop_gradient(log_softmax(mix, target))
    return -total(jnp.exp(log_t) * log_q, over_outcomes(target))
