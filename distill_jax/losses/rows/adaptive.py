"""AKL: forward and reverse KL, weighed by where student and teacher still differ."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.rows.outcomes import outcomes
from distill_jax.losses.rows.tempering import Temper
from distill_jax.losses.rows.vocabulary import reads
from distill_jax.losses.targets import Target, TopKTarget

Array = Any


@reads(TopKTarget)
def adaptive_kl(logits: Array, target: Target, *, mu: float = 0.5, temperature: float = 1.0,
                temper: Temper = "exact") -> Array:
    """(g_head KL(p||q) + g_tail KL(q||p)) / (g_head + g_tail) * tau^2, g = sum of |p - q| over head or tail.

    AKL (Wu et al. 2024, 2404.02657); p teacher, q student, mu 0.5. logits float32 [N,V] -> float32 [N]. The
    head is the smallest set of most probable tokens that holds a mass of at least mu of the teacher's; equally probable
    ones are in it together. No gradient through the weights; both are 1/2 where p = q. (The authors' code puts the
    token that crosses mu into the tail unless it is the first; DSKD's agrees with the paper.)

    Tail: on a `TopKTarget` the bucket counts as tail, also where the kept tokens do not reach mu. It sorts: dearer than
    the other losses on a `Full` target. Raises ValueError for mu outside (0, 1].
    """
    if not 0.0 < mu <= 1.0:
        raise ValueError(f"adaptive_kl needs 0 < mu <= 1 (the teacher's mass in the head), got {mu}")
    log_q, log_p = outcomes(logits, target, temperature, temper)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    head = _head(p[:, :-1], mu) if isinstance(target, TopKTarget) else _head(p, mu)
    head = jnp.pad(head, ((0, 0), (0, p.shape[-1] - head.shape[-1])))
    gap = jax.lax.stop_gradient(jnp.abs(p - q))
    of_head, of_all = jnp.sum(jnp.where(head, gap, 0.0), axis=-1), jnp.sum(gap, axis=-1)
    share = jnp.where(of_all > 0, of_head / jnp.where(of_all > 0, of_all, 1.0), 0.5)
    forward, reverse = jnp.sum(p * (log_p - log_q), axis=-1), jnp.sum(q * (log_q - log_p), axis=-1)
    return temperature**2 * (share * forward + (1.0 - share) * reverse)


def _head(p: Array, mu: float) -> Array:
    """[N,M] -> bool [N,M]: tokens such that the more probable ones together hold less than mu."""
    falling = -jnp.sort(-p, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    least = jnp.min(jnp.where(before < mu, falling, jnp.inf), axis=-1)
    return p >= least[:, None]
