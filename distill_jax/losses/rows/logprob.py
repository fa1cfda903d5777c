"""Log-probability of the realised token and entropy of the distribution, row by row."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.rows.outcomes import log_normalizer
from distill_jax.losses.rows.vocabulary import Part, first_id, here, reads, size, spread, summed, total
from distill_jax.losses.targets import Full, Known, Labels, SampledTarget, Target, TopKTarget

Array = Any


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _at(logits: Array, ids: Array, part: Part | None) -> Array:
    """logits[n, ids[n]]. The gradient is a comparison, which fuses, rather than a scatter into zeros [N,V]."""
    at = ids - first_id(logits.shape[-1], part)
    inside = (at >= 0) & (at < logits.shape[-1])
    found = jnp.take_along_axis(logits, jnp.where(inside, at, 0)[:, None], axis=-1)[:, 0]
    return summed(jnp.where(inside, found, 0.0), part) if part else found


def _at_fwd(logits: Array, ids: Array, part: Part | None) -> tuple[Array, tuple[Array, Array]]:
    return _at(logits, ids, part), (ids, jnp.zeros((0, logits.shape[-1]), logits.dtype))


def _at_bwd(part: Part | None, saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    ids, like = saved
    own = first_id(like.shape[-1], part) + jnp.arange(like.shape[-1], dtype=ids.dtype)
    return jnp.where(own[None, :] == ids[:, None], grad[:, None].astype(like.dtype), 0.0), None


_at.defvjp(_at_fwd, _at_bwd)


@reads(Labels)
def log_prob(logits: Array, target: Target) -> Array:
    """log q(y). logits float32 [N,V], target `Labels` -> float32 [N]; ids outside [0, V) are read as id 0 or V-1.

    Raises ValueError for a target that is not `Labels`.
    """
    if not isinstance(target, Labels):
        raise ValueError(f"log_prob needs Labels (target='tokens'), got {type(target).__name__}")
    of_token: Any = _at(logits, jnp.clip(target.ids, 0, size(logits) - 1), here())
    return of_token - log_normalizer(logits, here())


@reads(Labels, Full, TopKTarget, SampledTarget, Known, whole=True)
def entropy(logits: Array, target: Target | None = None) -> Array:
    """H(q) = -sum_v q(v) log q(v) in nats. logits float32 [N,V] -> float32 [N]; the target is not read."""
    norm = log_normalizer(logits, here())
    return norm - total(jnp.exp(logits - spread(norm, here())) * logits, here())
