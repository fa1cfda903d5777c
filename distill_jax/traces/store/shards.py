"""Committed shards: data files first, then the one JSON file that makes them visible.

    shards/000000.json                commit: rows, checksums, state of the writer, which files hold the data
    data/000000-1f3a9c20/tokens/      arrays of that shard, in a folder named after their content

The folder is named after its content, so that a second writer, or a resumed one that is given other rows, never
touches the files of a committed shard; the loser of a race for one number gets an error.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import distill_jax.traces.store.ragged as ragged
from distill_jax.traces.store.kv import Kv
from distill_jax.traces.store.sealed import CorruptShard, canonical, seal, unseal


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One committed shard, some 50 bytes a row.

    number, first_row, rows
    columns  what is known of each row: arrays, `digests` uint64, `groups` strings, `flags` {name: rows that have it}
    arrays   how each array is stored
    body     the rest of the JSON file (state of the writer, counts)
    """

    number: int
    first_row: int
    rows: int
    columns: Mapping[str, Any]
    arrays: Mapping[str, ragged.ArrayMeta]
    body: Mapping[str, Any]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Commit":
        """From the JSON object of a commit."""
        rest = {k: v for k, v in body.items() if k not in ("columns", "arrays")}
        columns = {name: _compact(name, values) for name, values in body["columns"].items()}
        arrays = {name: ragged.ArrayMeta.from_json(v) for name, v in body["arrays"].items()}
        return cls(number=body["shard"], first_row=body["first_row"], rows=body["rows"], columns=columns,
                   arrays=arrays, body=rest)


def _compact(name: str, values: Any) -> Any:
    """A column of a commit in little memory: a store may have millions of rows."""
    if name == "digests":
        return np.array([int(v, 16) for v in values], np.uint64)
    if name == "groups":
        return tuple(sys.intern(v) for v in values)
    if name == "flags":
        return {flag: np.array(rows, np.int32) for flag, rows in values.items()}
    kinds = {"verdicts": np.int8, "documents": np.int64, "outcomes": np.int64, "states": np.int64}
    return np.array(values, kinds.get(name, np.int32))


class Raced(ValueError):
    """Another writer was first: what it committed is there, and who begins again goes on after it."""


class Shards:
    """The committed shards below `prefix` ("" for the rows, `signals/<name>/` for a signal)."""

    def __init__(self, kv: Kv, prefix: str, owner: str) -> None:
        self.kv = kv
        self.prefix = prefix
        self.owner = owner  # checksum of the manifest or header: a commit of another store is noticed
        self.commits: list[Commit] = []
        self._clean = False  # only the first shard a writer commits can have leftovers of one before it
        self.refresh()

    def refresh(self) -> None:
        """Read commits that appeared since. Raises CorruptShard for a changed, missing or foreign one."""
        folder = f"{self.prefix}shards/"
        numbers = sorted(int(k[:-5]) for k in self.kv.keys(folder) if k.endswith(".json") and k[:-5].isdigit())
        if numbers != list(range(len(numbers))):
            gap = next(i for i, n in enumerate(numbers) if i != n)
            raise CorruptShard(f"{self.kv.url}: {self._key(gap)} is missing though later shards are there", shard=gap)
        fresh = numbers[len(self.commits):]
        for number, data in zip(fresh, self.kv.read_many(self._key(n) for n in fresh)):
            if data is None:
                raise CorruptShard(f"{self.kv.url}: {self._key(number)} disappeared", shard=number)
            body = unseal(data, f"{self.kv.url}: {self._key(number)}", number)
            first = self.commits[-1].first_row + self.commits[-1].rows if self.commits else 0
            if (body["shard"], body["first_row"], body["owner"]) != (number, first, self.owner):
                raise CorruptShard(f"{self.kv.url}: {self._key(number)} belongs to another place or store",
                                   shard=number)
            self.commits.append(Commit.of(body))

    def _key(self, number: int) -> str:
        return f"{self.prefix}shards/{number:06d}.json"

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.commits[-1].first_row + self.commits[-1].rows if self.commits else 0

    def commit(self, body: Mapping[str, Any], tables: Mapping[str, ragged.Table]) -> None:
        """Write the next shard: its arrays, then its commit. Nothing is visible before the last write."""
        number = len(self.commits)
        encoded = {name: ragged.encode(table) for name, table in tables.items()}
        metas = {name: e.meta(name) for name, e in encoded.items()}
        identity = canonical([metas[n].to_json() for n in sorted(metas)])
        tag = f"{number:06d}-{ragged.checksum(identity.encode())[:8]}"
        place = f"{self.prefix}data/{tag}/"
        arrays = {n: {**m.to_json(), "path": f"{place}{n}/"} for n, m in metas.items()}
        full = {**body, "shard": number, "first_row": self.total, "owner": self.owner, "arrays": arrays}
        data = seal(full, "the writer's state")
        try:
            self.kv.write_many({f"{place}{n}/{f}": b for n, e in encoded.items() for f, b in e.files.items()})
        except OSError:
            self._drop(tag)  # frees what a full disk took; once the commit itself is tried, nothing is deleted
            raise
        if not self.kv.write_new(self._key(number), data):
            self.refresh()
            if not any(m.path.startswith(place) for m in self.commits[number].arrays.values()):
                self._drop(tag)
            raise Raced(f"{self.kv.url}: another writer has committed {self._key(number)} meanwhile; one store "
                        "or signal takes one writer at a time. Run again to continue after its last shard")
        self.commits.append(Commit.of(json.loads(canonical(full))))
        if not self._clean:
            self._drop_leftovers(number, tag)
            self._clean = True

    def _drop(self, tag: str) -> None:
        with contextlib.suppress(OSError):
            self.kv.delete(f"{self.prefix}data/{tag}/")

    def _drop_leftovers(self, number: int, keep: str) -> None:
        """Delete what a killed writer left of this shard. Safe once it is committed: nobody can commit it again."""
        for tag in self.kv.folders(f"{self.prefix}data/"):
            if tag.startswith(f"{number:06d}-") and tag != keep:
                self._drop(tag)

    def verify_files(self, commit: Commit) -> None:
        """Compare every data file of a shard with the checksums of its commit."""
        for meta in commit.arrays.values():
            keys = [meta.path + f for f in meta.files]
            for key, (size, expected), data in zip(keys, meta.files.values(), self.kv.read_many(keys)):
                if data is None:
                    raise CorruptShard(f"{key} is missing", shard=commit.number)
                if len(data) != size or ragged.checksum(data) != expected:
                    raise CorruptShard(f"{key}: {len(data)} bytes that do not match the checksum of the {size} "
                                       "written", shard=commit.number)
