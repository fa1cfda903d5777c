"""The device mesh. Outermost first, so that what talks most lies closest:

data     replicas: rows
fsdp     rows, and parameters in parts
expert   rows, and the experts of a mixture
context  tokens of a row
tensor   heads, MLP, vocabulary
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")
ROW_AXES = ("data", "fsdp", "expert")
"""Axes that the rows of a batch are cut over."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None, *,
              expert: int = 1, context: int = 1) -> Mesh:
    """A mesh over `devices` (all of them by default) with Auto axes; at most one size may be -1 ("the rest").

    Raises ValueError, naming both counts, when the sizes do not multiply to the number of devices.
    """
    pool = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, expert, context, tensor)))
    wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of one device"
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
    return placed(shape)


def placed(shape: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes whose neighbours are neighbours on the machine; where the sides of a TPU slice do not
    multiply to an axis, it takes a part of one."""
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(tuple(shape), AXES, types, devices=devices)
    except NotImplementedError:
        grid = mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def batch_spec() -> PartitionSpec:
    """Rows of a batch are spread over `ROW_AXES`; tokens of a row stay together."""
    return PartitionSpec(ROW_AXES)


def row_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are cut into: their number must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES if axis in mesh.shape)
