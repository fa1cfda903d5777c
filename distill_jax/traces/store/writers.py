"""The writer of rows: they are gathered until a shard is whole, then the shard is committed."""

import copy
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, Self

import numpy as np

from distill_jax.core.roles import Role
from distill_jax.traces.store.ragged import Table
from distill_jax.traces.store.reader import seeds_of
from distill_jax.traces.store.rows import TOKEN_PLANES, Row, checked, digest, encode_document, encode_tokens
from distill_jax.traces.store.shards import Shards

SHARD_TOKENS = 1 << 19
"""A shard ends early at this many tokens, so that long rows do not make writers hold gigabytes."""


class Writer(ABC):
    """Shared life cycle: a context manager that closes, or aborts when its block raises."""

    @abstractmethod
    def close(self) -> None:
        """Commit what is left and mark the store or signal complete."""

    @abstractmethod
    def abort(self) -> None:
        """Forget the rows of the shard that is not whole. Nothing committed is lost."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class StoreWriter(Writer):
    """Appends rows to a store. Open it again after a kill: it continues after the last whole shard.

    state     JSON value committed with each shard: where the writer stood right after the shard's last row. After a
              restart it is what the last commit holds, and `next_row` rows are there
    next_row  id the next appended row gets

    A row that was appended is safe only once its shard is committed; a resumed caller goes back to `state` and
    appends the rows after it again. The same rows give the same bytes, interrupted or not.
    """

    def __init__(self, shards: Shards, shard_rows: int, shard_tokens: int) -> None:
        if shard_rows < 1 or shard_tokens < 1:
            raise ValueError(f"shard_rows and shard_tokens must be at least 1, got {shard_rows}, {shard_tokens}")
        self._shards = shards
        self._limits = (shard_rows, shard_tokens)
        last = shards.commits[-1].body if shards.commits else {}
        self.state: dict[str, Any] = copy.deepcopy(last.get("state", {}))
        self._committed = (copy.deepcopy(self.state), bool(last.get("final", False)))
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._columns: dict[str, list[Any]] = {
            name: [] for name in ("lengths", "digests", "documents", "groups", "verdicts")}
        self._flags: dict[str, list[int]] = {}
        self._roles: Counter[str] = Counter()

    @property
    def next_row(self) -> int:
        return self._shards.total + len(self._tokens)

    def append(self, row: Row, state: dict[str, Any] | None = None) -> int:
        """Add a row, and set `state` to what holds after it. Returns the row's id; commits when a shard is whole."""
        arrays = checked(row)
        if int(arrays.parts.max()) >= len(row.trace.segments):
            raise ValueError(f"row.parts: segment {arrays.parts.max()} of a trace with {len(row.trace.segments)}")
        document = np.frombuffer(encode_document(row.text, row.trace), np.uint8)
        if state is not None:
            self.state = state
        self._tokens.append(encode_tokens(arrays))
        self._documents.append(document[None, :])
        verdict = -1 if row.trace.verdict is None else int(row.trace.verdict)
        for name, value in (("lengths", len(arrays)), ("digests", digest(arrays)), ("documents", len(document)),
                            ("groups", row.trace.group), ("verdicts", verdict)):
            self._columns[name].append(value)
        for flag in dict.fromkeys(row.trace.flags):
            self._flags.setdefault(flag, []).append(len(self._tokens) - 1)
        for role, count in enumerate(np.bincount(arrays.roles)):
            if count:
                self._roles[Role(role).name.lower()] += int(count)
        number = self.next_row - 1
        if len(self._tokens) >= self._limits[0] or sum(self._columns["lengths"]) >= self._limits[1]:
            self._flush(final=False)
        return number

    def commit(self) -> None:
        """Commit the rows there are as a shard, whole or not."""
        if self._tokens:
            self._flush(final=False)

    def _flush(self, *, final: bool) -> None:
        seeds = seeds_of(np.array([int(d, 16) for d in self._columns["digests"]], np.uint64))
        body = {"rows": len(self._tokens), "columns": {**self._columns, "flags": self._flags},
                "roles": dict(self._roles), "final": final, "state": self.state}
        tables = {"tokens": Table(rows=self._tokens, names=TOKEN_PLANES, seeds=seeds, least=256, most=4096),
                  "text": Table(rows=self._documents, names=["byte.0"], seeds=seeds, least=4096, most=65536)}
        try:
            self._shards.commit(body, tables)
        except Exception:
            self.abort()
            raise
        self._committed = (copy.deepcopy(self.state), final)
        self._clear()

    def close(self) -> None:
        """Commit the rows left over and mark the store as complete. Does nothing when nothing changed."""
        if self._tokens or self._committed != (self.state, True):
            self._flush(final=True)

    def abort(self) -> None:
        self.state = copy.deepcopy(self._committed[0])
        self._clear()
