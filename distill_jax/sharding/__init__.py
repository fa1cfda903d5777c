"""Meshes and the one table from parameter paths and named activations to mesh axes."""

from distill_jax.sharding.mesh import AXES, batch_spec, make_mesh, row_shards
from distill_jax.sharding.rules import DEFAULT_RULES, Rules, constrain, param_shardings, use_rules

__all__ = [
    "AXES", "DEFAULT_RULES", "Rules", "batch_spec", "constrain", "make_mesh", "param_shardings", "row_shards",
    "use_rules",
]
