"""From a source to arrays on the mesh: each process makes its own rows, the next batch is put while a step runs."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core.batch import Batch
from distill_jax.sharding import batch_spec, fit_spec, row_shards

Tree = Any


class BatchSource(Protocol):
    """What training needs of a source: the global batch of a step, the same whenever it is asked for."""

    @property
    def batch_size(self) -> int: ...

    def batch(self, step: int) -> Batch: ...


Serve = Callable[[Any, int, int, int], Iterator[Batch]]
"""(source, start step, share, number of shares) -> the rows of that share, step by step (`data.sources.serve`)."""


class Feed:
    """Iterator over global batches on the mesh, from step `start`."""

    def __init__(self, source: BatchSource, mesh: Mesh, start: int, serve: Serve) -> None:
        self._mesh = mesh
        shards = row_shards(mesh)
        if source.batch_size % shards:
            raise ValueError(f"a batch of {source.batch_size} rows does not divide over the {shards} parts that the "
                             f"mesh cuts rows into; make it a multiple of {shards}, or change the mesh")
        self._share, self._shares = row_share(NamedSharding(mesh, batch_spec()), source.batch_size)
        self._rows = serve(source, start, self._share, self._shares)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return place(next(self._rows), self._mesh, self._share, self._shares)

    def close(self) -> None:
        """End what reads ahead; there is no next batch then."""
        close = getattr(self._rows, "close", None)  # generators and `data.serve.Served` have one
        if close is not None:
            close()


def row_share(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """Which share of the rows this process's devices hold, and of how many: (0, 1) with a single process.

    Processes whose devices hold the same rows (tensor parallelism across hosts) have the same share.
    """
    held = sharding.addressable_devices_indices_map((rows,)).values()
    spans = [s[0].indices(rows)[:2] for s in held if s is not None]
    low, high = min(a for a, _ in spans), max(b for _, b in spans)
    size = high - low
    if rows % size or low % size:
        raise ValueError(f"this process's devices hold rows {low}-{high} of {rows}, not one equal share; order the "
                         "mesh so that the devices of a process are neighbours along data and fsdp")
    return low // size, rows // size


def place(batch: Tree, mesh: Mesh, share: int = 0, shares: int = 1) -> Tree:
    """Rows (NumPy, leaves [B/shares, T, ...]) of this process's share, as parts of global arrays [B, T, ...]: rows cut
    over `ROW_AXES`, and the tokens of a row over `context` where it divides them."""
    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        shape, first = (x.shape[0] * shares, *x.shape[1:]), x.shape[0] * share
        sharding = NamedSharding(mesh, fit_spec(PartitionSpec(*batch_spec(), "context"), shape, mesh.shape))
        if sharding.is_fully_addressable and shares == 1:
            return jax.device_put(x, sharding)

        def part(index: Any) -> np.ndarray:
            low, high, _ = index[0].indices(shape[0])
            return x[(slice(low - first, high - first), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)


def place_global(batch: Tree, mesh: Mesh) -> Tree:
    """A whole global batch that every process has, on the mesh. For evaluations; `Feed` makes only a process's rows."""
    return place(batch, mesh)


def serve_plain(source: BatchSource, start: int, share: int, shares: int) -> Iterator[Batch]:
    """Every step's rows made when asked for, in this thread."""
    step = start
    while True:
        batch = source.batch(step)
        yield batch if shares == 1 else jax.tree.map(
            lambda x: x[share * (x.shape[0] // shares):(share + 1) * (x.shape[0] // shares)], batch)
        step += 1
