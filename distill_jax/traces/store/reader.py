"""Random reads over committed shards, from any number of threads."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from distill_jax.traces.store.kv import as_os_error, is_transient
from distill_jax.traces.store.ragged import RaggedArray
from distill_jax.traces.store.sealed import CorruptShard
from distill_jax.traces.store.shards import Commit, Shards

WINDOW = 32
"""Rows a batch of reads. Two batches are in flight within a call: bounded memory, and latency is hidden."""
HANDLES = 4096
"""Open shards kept; a handle is five kilobytes and holds no data. Reads of a shuffled store go to another shard each:
of more shards than this, most have to be opened again."""


Tables = Mapping[str, Mapping[str, np.ndarray]]
"""{table: {plane: uint8 [n]}} of a row."""


class Layout(Protocol):
    """What a reader needs to know of a commit's rows."""

    def sizes(self, commit: Commit, table: str) -> np.ndarray:
        """int [rows]: entries of each row in an array."""
        ...

    def seeds(self, commit: Commit, table: str) -> np.ndarray:
        """uint32 [rows]: what the rows' checksums begin with in an array."""
        ...


def seeds_of(digests: np.ndarray) -> np.ndarray:
    """CRC seeds of rows, uint32: the low half of their content checksums."""
    return (digests & np.uint64(0xFFFFFFFF)).astype(np.uint32)


class Reader:
    """Reads the byte planes of rows; every byte is checked before it is returned."""

    def __init__(self, shards: Shards, layout: Layout) -> None:
        self.shards = shards
        self._layout = layout
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[int, str], RaggedArray] = OrderedDict()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    def _windows(self, ids: Sequence[int] | np.ndarray) -> Iterator[list[tuple[Commit, int]]]:
        """(commit, row within it) of each row id, `WINDOW` at a time. Raises IndexError for ids outside the store."""
        wanted = np.asarray(ids, np.int64).reshape(-1)
        total = self.shards.total
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < total:
            bad = wanted[(wanted < 0) | (wanted >= total)][0]
            raise IndexError(f"{self.shards.kv.url}{self.shards.prefix and '/' + self.shards.prefix}: no row {bad}; "
                             f"rows run from 0 to {total - 1}")
        firsts = np.array([c.first_row for c in self.shards.commits], np.int64)
        at = np.searchsorted(firsts, wanted, side="right") - 1
        for begin in range(0, len(wanted), WINDOW):
            part = slice(begin, begin + WINDOW)
            yield [(self.shards.commits[s], int(i - firsts[s])) for s, i in zip(at[part], wanted[part])]

    def read(self, ids: Sequence[int] | np.ndarray, tables: Sequence[str]) -> Iterator[tuple[Commit, int, Tables]]:
        """(commit, row within it, its tables) of each row, in the order asked; the first of them are being fetched
        when this returns."""
        windows = ((window, self._start(window, tables)) for window in self._windows(ids))
        return self._taken(next(windows, None), windows, tables)

    def _taken(self, current: Any, windows: Iterator[Any], tables: Sequence[str]
               ) -> Iterator[tuple[Commit, int, Tables]]:
        while current is not None:
            following = next(windows, None)
            for (commit, row), futures in zip(*current):
                yield commit, row, {t: self._finish(commit, row, *f) for t, f in zip(tables, futures)}
            current = following

    def table(self, commit: Commit, name: str) -> Mapping[str, np.ndarray]:
        """The byte planes of an array that a shard has once, not per row."""
        array = self._array(commit, name)
        return self._finish(commit, None, array, array.start(0))

    def _start(self, window: list[tuple[Commit, int]], tables: Sequence[str]) -> list[list[tuple[RaggedArray, Any]]]:
        batch = ts.Batch()  # reads of one shard share a read of its index
        out = []
        for commit, row in window:
            arrays = [self._array(commit, t) for t in tables]
            out.append([(a, a.start(row, batch)) for a in arrays])
        batch.submit()
        return out

    def _finish(self, commit: Commit, row: int | None, array: RaggedArray, future: Any) -> dict[str, np.ndarray]:
        try:
            return array.finish(row or 0, future)
        except ValueError as e:
            where = f"{self.shards.kv.url}: {array.meta.path}"
            if is_transient(e):
                raise as_os_error(e, where) from None
            raise CorruptShard(f"{where}: {str(e).splitlines()[0][:200]}", shard=commit.number,
                               row=None if row is None else commit.first_row + row) from None

    def _array(self, commit: Commit, table: str) -> RaggedArray:
        key = (commit.number, table)
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
                return found
        meta = commit.arrays[table]
        made = RaggedArray(self.shards.kv.below(meta.path), meta, self._layout.sizes(commit, table),
                           self._layout.seeds(commit, table), self._context)
        with self._lock:
            self._open[key] = made
            while len(self._open) > HANDLES:
                self._open.popitem(last=False)
        return made
