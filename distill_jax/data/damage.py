"""Rows that cannot be read, for sources that go on without them (`Store(bad_shards="skip")`).

A sequence then lacks the row, and its place is padding. The plan is as it would be: no other row moves into another
batch, so what one process finds changes nothing for the others, nor after a restart.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.traces.store import CorruptShard, TraceStore
from distill_jax.traces.store.sealed import MEND

MOST = 0.5
"""Share of a store's rows that may be lost: with more, something else is wrong than a shard."""
DOUBTS = 8
"""Reads of a store that may fail and succeed when they are tried again."""


@dataclass(frozen=True, kw_only=True)
class BadShard:
    """A shard with rows that cannot be read: `lost` of its `rows`. why: of the first one that was met."""

    place: str
    lost: int
    rows: int
    why: str

    def __str__(self) -> str:
        return f"{self.place}: {self.lost} of its {self.rows} rows cannot be read and are left out ({self.why})"


class Damage:
    """What was found of one store while it was read; safe from many threads.

    lost   bool [N]: rows of the store that cannot be read, tokens or one of the signals
    found  the shards they are in, in the order they were met
    """

    def __init__(self, store: TraceStore, signals: Sequence[str]) -> None:
        self.lost = np.zeros(len(store), bool)
        self.found: list[BadShard] = []
        self._store, self._names = store, signals
        self._lock, self._doubts = threading.Lock(), 0

    def note(self, error: CorruptShard) -> None:
        """Read the whole shard of an error again, and mark what of it cannot be read.

        Raises the error where it does not say which row, ValueError where too much of the store is lost.
        """
        with self._lock:
            if error.shard is None or error.row is None:
                raise error
            if self.lost[error.row]:
                return  # another thread was faster
            commit = self._store.shards[error.shard]
            rows = np.arange(commit.first_row, commit.first_row + commit.rows)
            bad = _unreadable(self._store.read, rows)
            if "/text/" in error.what:  # read while a source is opened, if at all
                bad |= _unreadable(self._store.traces, rows)
            for name in self._names:
                bad |= _unreadable(self._store.signal(name).begin, rows)
            if not bad:
                self._doubts += 1
                if self._doubts > DOUBTS:
                    raise error
            self._mark(error, sorted(bad), commit.rows)

    def _mark(self, error: CorruptShard, bad: list[int], rows: int) -> None:
        self.lost[bad] = True
        total, shard = int(self.lost.sum()), f"{self._store.url}: shard {error.shard}"
        if total > MOST * len(self.lost):
            raise ValueError(f"{self._store.url}: {total} of {len(self.lost)} rows cannot be read, the last found in "
                             f"shard {error.shard} ({error.what}): too many to go on without them; {MEND}")
        if bad:
            self.found = [b for b in self.found if b.place != shard] + [
                BadShard(place=shard, lost=len(bad), rows=rows, why=f"row {error.row}: {error.what}")]


def _unreadable(read: Callable[[np.ndarray], Iterable[object]], rows: np.ndarray) -> set[int]:
    """Those of consecutive rows that `read` cannot read, twice over: bytes may be damaged on their way, too."""
    bad: set[int] = set()
    while len(rows) and (failed := _first_failed(read, rows)) is not None:
        if _first_failed(read, np.array([failed])) is not None:
            bad.add(failed)
        rows = rows[rows > failed]
    return bad


def _first_failed(read: Callable[[np.ndarray], Iterable[object]], rows: np.ndarray) -> int | None:
    try:
        for _ in read(rows):
            pass
    except CorruptShard as e:
        if e.row is None:
            raise
        return e.row
    return None
