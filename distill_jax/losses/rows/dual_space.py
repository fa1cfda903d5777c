"""Row losses of dual-space KD. Shapes: N rows, V vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.rows.divergences import generalized_jsd
from distill_jax.losses.targets import Full, Target

Array = Any


def jsd_where_right(logits: Array, target: Target, *, beta: float = 0.0, temperature: float = 1.0) -> Array:
    """`generalized_jsd` to a teacher where its most probable token is the one that stands there, elsewhere 0.

    Zhang et al. 2024 (DSKD, 2406.17328): cross-model attention is learned from scratch, so its
    distribution is a teacher only where it has the token right. logits float32 [N,V] -> float32 [N]; beta 0 is
    KL(teacher || student), 1 is KL(student || teacher); times temperature^2, which the published code does not do.
    Needs a `Full` target with its token (a provider run beside the student). Raises ValueError for other targets.
    """
    if not isinstance(target, Full) or target.token is None:
        raise ValueError(f"jsd_where_right asks for the teacher's most probable token: give a provider as the term's "
                         f"target, not a {type(target).__name__}")
    right = jnp.argmax(jax.lax.stop_gradient(target.logits), axis=-1) == target.token
    return jnp.where(right, generalized_jsd(logits, target, beta=beta, temperature=temperature), 0.0)
