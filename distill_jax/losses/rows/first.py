"""Concentrated knowledge (FIRST): only the teacher's k most probable outcomes count, renormalised on both sides.

The student's mass outside these k ids is free: the loss has the same value whether it is 0 or nearly 1. With an
unchanged teacher this is the biased loss that 2503.16870 warns of; use a tail bucket (`forward_kl`) unless you want
exactly this. Shapes: N rows, V vocabulary, K stored outcomes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.head import NEG, wide
from distill_jax.losses.rows.outcomes import ABSENT, log_normalizer
from distill_jax.losses.targets import Target, TopKTarget

Array = Any


def renormalised_kl(logits: Array, target: Target, *, k: int = 5, temperature: float = 1.0) -> Array:
    """KL(t || s) over the k most probable stored ids: t ~ p^(1/tau), s ~ q, each divided by its sum over these ids.

    Shu et al. 2024 (FIRST, 2408.12168), section 3; p teacher, q student. `temperature` tau re-tempers the teacher
    alone, which is exact here because nothing outside the k ids counts; there is no factor tau^2. Their code adds 1e-6
    to every probability first; absent ids (-1, or none of the student's) are left out here. logits float32 [N,V] ->
    float32 [N]; 0 for a row without outcomes. Raises ValueError for other targets than `TopKTarget`, and for k < 2.
    """
    if not isinstance(target, TopKTarget):
        raise ValueError(f"renormalised_kl needs a top-k signal as its target, got {type(target).__name__}")
    if k < 2 or temperature <= 0:
        raise ValueError(f"renormalised_kl needs k >= 2 and temperature > 0, got k={k}, temperature={temperature}")
    dtype = wide(logits)
    log_p, at = jax.lax.top_k(jax.lax.stop_gradient(target.logprobs.astype(dtype)), min(k, target.ids.shape[-1]))
    ids = jnp.take_along_axis(target.ids, at, axis=-1)
    inside = (ids >= 0) & (ids < logits.shape[-1])
    z = jnp.take_along_axis(logits.astype(dtype), jnp.where(inside, ids, 0), axis=-1)
    there = inside & (log_p > ABSENT) & (jax.lax.stop_gradient(z) > ABSENT)
    some = jnp.any(there, axis=-1)
    log_t, log_s = (_normalised(jnp.where(there, x, NEG), some) for x in (log_p / temperature, z))
    terms = jnp.where(there, jnp.exp(log_t) * (log_t - log_s), jnp.zeros_like(log_s))
    return jnp.where(some, jnp.sum(terms, axis=-1), jnp.zeros_like(terms[:, 0]))


def _normalised(x: Array, some: Array) -> Array:
    """x - logsumexp(x) [N,K]; rows without any outcome count as zeros, so that nothing overflows in their gradient."""
    x = jnp.where(some[:, None], x, jnp.zeros_like(x))
    norm: Array = log_normalizer(x)
    return x - norm[:, None]
