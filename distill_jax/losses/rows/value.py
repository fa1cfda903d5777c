"""A critic's value of the state before each token: row losses on the one output of a value head, "logits" [N,1]."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.targets import Known, Target

Array = Any


def value(logits: Array, target: Target | None = None) -> Array:
    """V(state) of each token: float32 [N,1] -> [N]. With `lift_values` on a rollout: what GAE needs, before the update.
    """
    if logits.shape[-1] != 1:
        raise ValueError(f"a value head has one output, this source has {logits.shape[-1]}: name the critic "
                         "(`models.projectors.ValueHead`) as the term's student")
    return logits[:, 0]


def value_error(logits: Array, target: Target, *, clip: float | None = None, returns: str = "returns",
                old: str = "old_values") -> Array:
    """1/2 max((V - R)^2, (old + clip(V - old, -c, c) - R)^2), float32 [N,1] -> [N]; without c the first alone.

    R is the field `returns` (advantage + value of `rollout.advantages.gae`), old the field `old_values`. PPO
    (Schulman et al. 2017, 1707.06347, eq. 9); the clip is that of its published code. Raises ValueError where the
    term's target is not "fields", or the stream lacks one of them.
    """
    if not isinstance(target, Known):
        raise ValueError('value_error needs the fields of the stream: give its term target="fields"')
    now = value(logits)
    field = lambda name: jax.lax.stop_gradient(target.about.field(name)).astype(now.dtype)
    error = jnp.square(now - field(returns))
    if clip is not None:
        before = field(old)
        near = before + jnp.clip(now - before, -clip, clip)
        error = jnp.maximum(error, jnp.square(near - field(returns)))
    return 0.5 * error
