"""Meshes and the one table from parameter paths and named activations to mesh axes."""

from distill_jax.sharding.mesh import AXES, batch_spec, make_mesh, row_shards
from distill_jax.sharding.rules import (
    DEFAULT_RULES,
    Rules,
    active_rules,
    auto_axes,
    constrain,
    fit_spec,
    param_shardings,
    use_rules,
)

__all__ = [
    "AXES", "DEFAULT_RULES", "Rules", "active_rules", "auto_axes", "batch_spec", "constrain", "fit_spec", "make_mesh",
    "param_shardings", "row_shards", "use_rules",
]
