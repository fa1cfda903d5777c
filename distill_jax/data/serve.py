"""Batches read ahead by Grain. The position is one integer: the next step."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain

from distill_jax.core.batch import Batch


class Served(Iterator[Batch]):
    """Iterator over one process's slice of the global batches.

    Process i of n gets rows [i*B/n, (i+1)*B/n) of every batch, so any number of processes sees the same global order.
    `state()` is `{"step": next}`; it belongs to no process and can be restored under another process count.
    """

    def __init__(self, batch: Callable[[int, slice], Batch], rows: int, start_step: int, process_index: int,
                 process_count: int, *, stop_step: int | None = None, threads: int = 4, ahead: int = 4) -> None:
        if rows % process_count:
            raise ValueError(f"{rows} rows of the global batch do not divide over {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
        share = rows // process_count
        self._rows = slice(process_index * share, (process_index + 1) * share)
        self._batch = batch
        self._stop = stop_step
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, ahead))
        self.step = start_step
        self._iterator = self._start()

    def _start(self) -> Iterator[Batch]:
        stop = sys.maxsize if self._stop is None else max(self.step, self._stop)
        steps = grain.MapDataset.range(self.step, stop)
        return iter(steps.map(lambda step: self._batch(int(step), self._rows)).to_iter_dataset(self._options))

    def __next__(self) -> Batch:
        out = next(self._iterator)
        self.step += 1
        return out

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.step = int(state["step"])
        self._iterator = self._start()
