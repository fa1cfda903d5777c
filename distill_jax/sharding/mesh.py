"""The device mesh: axes `data` (replicas), `fsdp` (parameters and rows), `tensor` (heads, MLP, vocabulary)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with Auto axes; at most one size may be -1 ("the rest").

    Raises ValueError, naming both counts, when the sizes do not multiply to the number of devices.
    """
    pool = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor)))
    wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {wanted}: sizes must be positive, and at most one of them -1 (the rest)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(pool) % fixed:
            raise ValueError(f"mesh {wanted}: {len(pool)} devices cannot be divided by {fixed}; "
                             f"choose sizes whose product divides {len(pool)}")
        sizes[free[0]] = len(pool) // fixed
    elif fixed != len(pool):
        raise ValueError(f"mesh {wanted} needs {fixed} devices, but there are {len(pool)}; "
                         "change the sizes, or give -1 to the axis that should take the rest")
    shape = tuple(sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    if devices is not None:  # an explicit list keeps its order
        return Mesh(np.asarray(pool, dtype=object).reshape(shape), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types)


def batch_spec() -> PartitionSpec:
    """Rows of a batch are spread over every axis but `tensor`; tokens of a row stay together."""
    return PartitionSpec(ROW_AXES)
