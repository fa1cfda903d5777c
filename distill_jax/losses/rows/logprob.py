"""Log-probability of the realised token and entropy of the distribution, row by row."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.rows.outcomes import log_normalizer
from distill_jax.losses.targets import Labels, Target

Array = Any


@jax.custom_vjp
def _at(logits: Array, ids: Array) -> Array:
    """logits[n, ids[n]]. The gradient is a comparison, which fuses, rather than a scatter into zeros [N,V]."""
    return jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]


def _at_fwd(logits: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return _at(logits, ids), (ids, jnp.zeros((0, logits.shape[-1]), logits.dtype))


def _at_bwd(saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    ids, like = saved
    here = jnp.arange(like.shape[-1], dtype=ids.dtype)[None, :] == ids[:, None]
    return jnp.where(here, grad[:, None].astype(like.dtype), 0.0), None


_at.defvjp(_at_fwd, _at_bwd)


def log_prob(logits: Array, target: Target) -> Array:
    """log q(y). logits float32 [N,V], target `Labels` -> float32 [N]; ids outside [0, V) are read as id 0 or V-1.

    Raises ValueError for a target that is not `Labels`.
    """
    if not isinstance(target, Labels):
        raise ValueError(f"log_prob needs Labels (target='tokens'), got {type(target).__name__}")
    return _at(logits, jnp.clip(target.ids, 0, logits.shape[-1] - 1)) - log_normalizer(logits)


def entropy(logits: Array, target: Target | None = None) -> Array:
    """H(q) = -sum_v q(v) log q(v) in nats. logits float32 [N,V] -> float32 [N]; the target is not read."""
    norm = log_normalizer(logits)
    return norm - jnp.sum(jnp.exp(logits - norm[:, None]) * logits, axis=-1)
