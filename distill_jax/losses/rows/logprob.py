"""Log-probability of the realised token and entropy of the distribution, row by row."""

from typing import Any

import jax.numpy as jnp

from distill_jax.losses.rows.outcomes import log_normalizer
from distill_jax.losses.targets import Labels, Target

Array = Any


def log_prob(logits: Array, target: Target) -> Array:
    """log q(y). logits float32 [N,V], target `Labels` -> float32 [N]; ids outside [0, V) are read as id 0 or V-1.

    Raises ValueError for a target that is not `Labels`.
    """
    if not isinstance(target, Labels):
        raise ValueError(f"log_prob needs Labels (target='tokens'), got {type(target).__name__}")
    ids = jnp.clip(target.ids, 0, logits.shape[-1] - 1)
    return jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0] - log_normalizer(logits)


def entropy(logits: Array, target: Target | None = None) -> Array:
    """H(q) = -sum_v q(v) log q(v) in nats. logits float32 [N,V] -> float32 [N]; the target is not read."""
    norm = log_normalizer(logits)
    return norm - jnp.sum(jnp.exp(logits - norm[:, None]) * logits, axis=-1)
