"""Sums and counts per role: the only form in which a mean travels, so that it is global wherever it is divided."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.roles import NUM_ROLES, Role

Array = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoleSums:
    """sum and count float32 [NUM_ROLES]. Add two of them (`jax.tree.map`) over micro-batches; divide last."""

    sum: Array
    count: Array

    @property
    def mean(self) -> Array:
        """Over all roles; 0 where nothing was counted."""
        return _ratio(jnp.sum(self.sum), jnp.sum(self.count))


def by_role(values: Array, weights: Array, roles: Array) -> RoleSums:
    """sum of weights * values and of weights for each role. All [B,T]."""
    zero = jnp.zeros(NUM_ROLES, jnp.float32)
    at = jnp.clip(roles, 0, NUM_ROLES - 1).astype(jnp.int32)
    weights, values = weights.astype(jnp.float32), values.astype(jnp.float32)
    return RoleSums(zero.at[at].add(weights * values), zero.at[at].add(weights))


def means(metrics: Mapping[str, RoleSums]) -> dict[str, Array]:
    """`{"kd": mean over all roles, "kd/think": ..., ...}`; 0 where nothing was counted."""
    out: dict[str, Array] = {}
    for name, m in metrics.items():
        out[name] = m.mean
        out |= {f"{name}/{r.name.lower()}": _ratio(m.sum[r], m.count[r]) for r in Role if r is not Role.PAD}
    return out


def _ratio(total: Array, count: Array) -> Array:
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)
