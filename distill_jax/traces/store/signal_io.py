"""Reading and writing the signals of a store."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.traces.store.codecs import Codec, Columns, make_codec
from distill_jax.traces.store.heads import StoredHead, read_head
from distill_jax.traces.store.ragged import Table, column, plane_names, to_planes
from distill_jax.traces.store.reader import Reader, Tables, seeds_of
from distill_jax.traces.store.sealed import CorruptShard
from distill_jax.traces.store.shards import Commit, Shards
from distill_jax.traces.store.signals import SignalHeader, SignalRow, lay
from distill_jax.traces.store.vocabulary import Vocabulary
from distill_jax.traces.store.writers import Writer

CHUNKS = {"tokens": (256, 4096), "outcomes": (4096, 65536), "states": (4096, 1 << 18)}
"""Least and most entries an inner chunk of each table."""


class _Layout:
    def sizes(self, commit: Commit, table: str) -> np.ndarray:
        return commit.columns[table]

    def seeds(self, commit: Commit, table: str) -> np.ndarray:
        return np.zeros(1, np.uint32) if table == "vocabulary" else seeds_of(commit.columns["digests"])


def _load_vocabulary(reader: Reader) -> Vocabulary:
    """The numbering of ids, which the first shard holds."""
    commits = reader.shards.commits
    if not commits or "vocabulary" not in commits[0].arrays:
        return Vocabulary(np.zeros(0, np.int32))
    planes = reader.table(commits[0], "vocabulary")
    return Vocabulary(column(planes, "id", int(commits[0].columns["vocabulary"][0])))


class Undecoded:
    """The signal of one row as it was read and checked: decoded into a row, or straight into arrays of a batch."""

    def __init__(self, codec: Codec, tables: Tables, length: int, vocabulary: Vocabulary) -> None:
        self._codec, self._tables, self._length, self._vocabulary = codec, tables, length, vocabulary

    def row(self) -> SignalRow:
        return self._codec.decode(self._tables, self._length, self._vocabulary)

    def lay(self, into: Mapping[str, np.ndarray]) -> None:
        """As `signals.lay` of the row."""
        lay(self._codec.decode(self._tables, self._length, self._vocabulary, into), into)


class SignalReader:
    """A teacher signal of a store; `len` is the number of rows that have it. Reads are safe from many threads."""

    def __init__(self, name: str, header: SignalHeader, rows: Shards, shards: Shards) -> None:
        self.name = name
        self.header = header
        self._shards = shards
        self._codec = make_codec(header)
        self._reader = Reader(shards, _Layout())
        for commit in shards.commits:
            _check_rows(name, commit, rows)
        self._vocabulary = _load_vocabulary(self._reader)

    def __len__(self) -> int:
        return self._shards.total

    @property
    def shards(self) -> tuple[Commit, ...]:
        """The committed shards."""
        return tuple(self._shards.commits)

    def read(self, ids: Sequence[int] | np.ndarray) -> list[SignalRow]:
        """The signal of many rows, in the order asked, of the row type of the header's kind (`signals.ROWS`)."""
        return [said.row() for said in self.begin(ids)]

    def begin(self, ids: Sequence[int] | np.ndarray) -> Iterator[Undecoded]:
        """The signal of many rows, in the order asked; the first of them are being fetched when this returns."""
        found = self._reader.read(ids, tuple(self._codec.widths))
        return (Undecoded(self._codec, tables, int(commit.columns["tokens"][at]), self._vocabulary)
                for commit, at, tables in found)

    def head(self) -> StoredHead:
        """The teacher's head of a hidden signal. Raises ValueError for another kind, CorruptShard."""
        if self.header.head is None:
            raise ValueError(f"signal {self.name!r} is {self.header.kind}, only hidden signals have a head")
        return read_head(self._shards.kv, self.name, self.header.head)

    def verify(self) -> None:
        """Read and check every byte. Raises CorruptShard."""
        if self.header.head is not None:
            self.head()
        for commit in self._shards.commits:
            self.read(np.arange(commit.first_row, commit.first_row + commit.rows))
            self._shards.verify_files(commit)


class SignalWriter(Writer):
    """Appends the signal of row after row; shards end where the store's do.

    next_row  the row whose signal comes next; after a restart the first row of the first missing shard
    """

    def __init__(self, rows: Shards, shards: Shards, header: SignalHeader) -> None:
        self._rows = rows
        self._shards = shards
        self._codec = make_codec(header)
        self._vocabulary = _load_vocabulary(Reader(shards, _Layout()))
        self._clear()

    def _clear(self) -> None:
        self._encoded: list[Columns] = []

    @property
    def next_row(self) -> int:
        return self._shards.total + len(self._encoded)

    def append(self, signal: SignalRow) -> int:
        """Add the signal of row `next_row` and return that row's id. A row that was not scored gets an all-False
        mask. Commits when the store's shard is whole."""
        while self._is_empty():
            self._commit()
        number = self.next_row
        if number >= self._rows.total:
            raise ValueError(f"the store has {self._rows.total} rows and all of them have this signal")
        commit = self._rows.commits[len(self._shards.commits)]
        length = int(commit.columns["lengths"][number - commit.first_row])
        try:
            self._encoded.append(self._codec.encode(signal, length))
        except ValueError as e:
            raise ValueError(f"signal of row {number}: {e}") from None
        if len(self._encoded) == commit.rows:
            self._commit()
        return number

    def _is_empty(self) -> bool:
        """Whether the next shard of the store holds no rows (a closing commit)."""
        number = len(self._shards.commits)
        return number < len(self._rows.commits) and self._rows.commits[number].rows == 0

    def _commit(self) -> None:
        digests = self._rows.commits[len(self._shards.commits)].columns["digests"]
        seeds = seeds_of(digests)
        columns: dict[str, Any] = {"digests": [f"{int(d):016x}" for d in digests]}
        tables: dict[str, Table] = {}
        ids = [row["outcomes"]["id"] for row in self._encoded if "outcomes" in row]
        vocabulary = Vocabulary.of(ids) if not self._shards.commits else self._vocabulary
        if not self._shards.commits and len(vocabulary.ids):
            columns["vocabulary"] = [len(vocabulary.ids)]
            tables["vocabulary"] = Table(rows=[to_planes({"id": (vocabulary.ids, 3)})], names=plane_names({"id": 3}),
                                         seeds=np.zeros(1, np.uint32), least=4096, most=65536)
        for table, widths in self._codec.widths.items():
            rows = []
            for values in self._encoded:
                coded = {c: vocabulary.encode(v) if c == "id" else v for c, v in values[table].items()}
                rows.append(to_planes({c: (coded[c], width) for c, width in widths.items()}))
            columns[table] = [r.shape[1] for r in rows]
            least, most = CHUNKS[table]
            tables[table] = Table(rows=rows, names=plane_names(widths), seeds=seeds, least=least, most=most)
        self._encoded.clear()
        self._shards.commit({"rows": len(digests), "columns": columns}, tables)
        self._vocabulary = vocabulary

    def close(self) -> None:
        """Raises ValueError when rows of a shard are missing: a signal's shards are those of the store."""
        left = len(self._encoded)
        while not left and self._is_empty():
            self._commit()
        if left:
            commit = self._rows.commits[len(self._shards.commits)]
            first, rows = self._shards.total, commit.rows
            self.abort()
            raise ValueError(f"the signal of rows {first + left} to {first + rows - 1} is missing: shard "
                             f"{commit.number} needs all of its rows {first} to {first + rows - 1}, nothing of it "
                             "was written")

    def abort(self) -> None:
        self._clear()


def _check_rows(name: str, commit: Commit, rows: Shards) -> None:
    """The signal's shard was made for exactly the rows that are there."""
    where = f"signal {name!r}"
    if commit.number >= len(rows.commits):
        raise CorruptShard(f"{where} has this shard, the store does not", shard=commit.number)
    ours, theirs = commit.columns["digests"], rows.commits[commit.number].columns["digests"]
    if len(ours) != len(theirs):
        raise CorruptShard(f"{where} was made for {len(ours)} rows, the store's shard has {len(theirs)}",
                           shard=commit.number)
    other = np.flatnonzero(ours != theirs)
    if len(other):
        raise CorruptShard(f"{where} was made for another row than the one that stands there", shard=commit.number,
                           row=commit.first_row + int(other[0]))
