"""Batches read ahead by Grain. The position is one integer: the next step."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain

from distill_jax.core.batch import Batch


class Served(Iterator[Batch]):
    """Iterator over one process's slice of the global batches.

    Process i of n gets rows [i*B/n, (i+1)*B/n) of every batch, so any number of processes sees the same global order.
    `state()` is `{"step": next}`; it belongs to no process and can be restored under another process count.

    threads  that make batches; None: DISTILL_JAX_READ_THREADS, else 4
    ahead    batches made before they are asked for; None: DISTILL_JAX_READ_AHEAD, else 4
    """

    def __init__(self, batch: Callable[[int, slice], Batch], rows: int, start_step: int, process_index: int,
                 process_count: int, *, stop_step: int | None = None, threads: int | None = None,
                 ahead: int | None = None) -> None:
        if rows % process_count:
            raise ValueError(f"{rows} rows of the global batch do not divide over {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
        share = rows // process_count
        self._rows = slice(process_index * share, (process_index + 1) * share)
        self._batch = batch
        self._stop = stop_step
        self._options = grain.ReadOptions(
            num_threads=threads or _whole_number("DISTILL_JAX_READ_THREADS", 4),
            prefetch_buffer_size=ahead or _whole_number("DISTILL_JAX_READ_AHEAD", 4))
        self.step = start_step
        self._iterator = self._start()

    def _start(self) -> Any:
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
        self.close()
        self.step = int(state["step"])
        self._iterator = self._start()

    def close(self) -> None:
        """End the threads, each after the batch it is making; there is no next batch then."""
        self._iterator.close()


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}={text!r}: expected a whole number of at least 1, e.g. {default}")
    return int(text)
