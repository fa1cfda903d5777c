"""`TraceStore`: traces tokenised once, with their teacher signals, in tensorstore.

    manifest.json                                  immutable: format, header
    shards/000000.json                             commit of a shard: rows, lengths, checksums, writer state
    data/000000-<tag>/tokens/  text/               zarr v3 arrays of the shard
    signals/<name>/header.json, shards/, data/     a teacher signal, same rows and shard boundaries
    signals/<name>/head/                           of hidden states: the head that makes logits of them

See `shards` for how a shard becomes visible, `ragged` for the arrays, `quantise` for the log-probs.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from distill_jax.traces.store.header import StoreHeader
from distill_jax.traces.store.heads import StoredHead, write_head
from distill_jax.traces.store.kv import Kv
from distill_jax.traces.store.reader import Reader, seeds_of
from distill_jax.traces.store.rows import (
    Row,
    RowArrays,
    RowIndex,
    decode_document,
    decode_tokens,
    digest,
)
from distill_jax.traces.store.sealed import CorruptShard, canonical, seal, seal_id, unseal
from distill_jax.traces.store.shards import Commit, Raced, Shards
from distill_jax.traces.store.signal_io import SignalReader, SignalWriter
from distill_jax.traces.store.signals import SignalHeader
from distill_jax.traces.store.writers import SHARD_TOKENS, StoreWriter
from distill_jax.traces.trace import Trace

FORMAT, VERSION = "distill_jax.traces", 1
MANIFEST = "manifest.json"

Ids = Sequence[int] | np.ndarray


class _RowLayout:
    def sizes(self, commit: Commit, table: str) -> np.ndarray:
        return commit.columns["lengths" if table == "tokens" else "documents"]

    def seeds(self, commit: Commit, table: str) -> np.ndarray:
        return seeds_of(commit.columns["digests"])


class TraceStore:
    """A store as it was when opened (`refresh` sees shards committed since). Reads are safe from many threads."""

    def __init__(self, kv: Kv, header: StoreHeader, owner: str) -> None:
        self.kv = kv
        self.header = header
        self._shards = Shards(kv, "", owner)
        self._reader = Reader(self._shards, _RowLayout())

    @classmethod
    def create(cls, url: str | os.PathLike[str], header: StoreHeader) -> "TraceStore":
        """A new, empty store. Raises ValueError where one is already."""
        kv = Kv(url)
        data = seal({"format": FORMAT, "version": VERSION, "header": header.to_json()}, "the store's header")
        if kv.read(MANIFEST) is not None or kv.keys("shards/"):
            raise ValueError(f"{kv.url} already holds a store; open it, or write to another place")
        if not kv.write_new(MANIFEST, data):
            raise Raced(f"{kv.url}: another process has created a store here meanwhile")
        return cls.open(url)

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> "TraceStore":
        """Open an existing store. Raises FileNotFoundError, or CorruptShard when the manifest or a commit is."""
        kv = Kv(url)
        data = kv.read(MANIFEST)
        if data is None:
            raise FileNotFoundError(f"no trace store at {kv.url}: there is no {MANIFEST}")
        body = unseal(data, f"{kv.url}: {MANIFEST}")
        if body.get("format") != FORMAT or body.get("version") != VERSION:
            raise ValueError(f"{kv.url}: format {body.get('format')} version {body.get('version')}, "
                             f"this program reads {FORMAT} version {VERSION}")
        return cls(kv, StoreHeader.from_json(body["header"]), seal_id(data))

    @classmethod
    def open_or_create(cls, url: str | os.PathLike[str], header: StoreHeader) -> "TraceStore":
        """To resume a writer: the store that is there, which must have this very header, or a new one."""
        try:
            store = cls.open(url)
        except FileNotFoundError:
            try:
                return cls.create(url, header)
            except ValueError:
                if Kv(url).read(MANIFEST) is None:
                    raise
                store = cls.open(url)  # another process made it meanwhile
        ours, theirs = (canonical(h.to_json(), "the header") for h in (header, store.header))
        if ours != theirs:
            old, new = store.header.to_json(), header.to_json()
            changed = [k for k in old if canonical(old[k]) != canonical(new[k])]
            raise ValueError(f"{store.url} was written with another {' and '.join(changed)}; continue it with the "
                             "settings it began with, or write to another place")
        return store

    def __reduce__(self) -> Any:  # handles and locks do not travel to worker processes
        return TraceStore.open, (self.kv.url,)

    def __repr__(self) -> str:
        return f"TraceStore({self.url}, {len(self)} rows, signals {self.signals()})"

    @property
    def url(self) -> str:
        return self.kv.url

    def __len__(self) -> int:
        return self._shards.total

    @property
    def shards(self) -> tuple[Commit, ...]:
        """The committed shards."""
        return tuple(self._shards.commits)

    @property
    def complete(self) -> bool:
        """Whether the last writer closed the store (rather than being interrupted)."""
        return bool(self._shards.commits) and bool(self._shards.commits[-1].body["final"])

    def refresh(self) -> None:
        """See the shards committed since the store was opened."""
        self._shards.refresh()

    def index(self) -> RowIndex:
        """Lengths, groups, verdicts and flags of all rows; reads nothing."""
        flags: list[tuple[str, ...]] = [()] * len(self)
        for commit in self._shards.commits:
            for flag, rows in sorted(commit.columns["flags"].items()):
                for at in rows:
                    flags[commit.first_row + int(at)] += (flag,)
        groups = tuple(g for c in self._shards.commits for g in c.columns["groups"])
        return RowIndex(lengths=self.lengths(), groups=groups, verdicts=self._column("verdicts", np.int8),
                        flags=tuple(flags), digests=self._column("digests", np.uint64))

    def lengths(self) -> np.ndarray:
        """int32 [N]: tokens of each row; reads nothing."""
        return self._column("lengths", np.int32)

    def _column(self, name: str, dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(c.columns[name] for c in self._shards.commits)])

    def fingerprint(self) -> str:
        """Hash of the content of all rows, tokens and text: the same for the same rows in the same order, however
        they are cut into shards."""
        h = hashlib.sha256(self._column("digests", np.uint64).tobytes())
        for commit in self._shards.commits:
            h.update(np.asarray(commit.arrays["text"].sums, np.uint32).tobytes())
        return h.hexdigest()[:32]

    def row(self, i: int) -> Row:
        """One row with its trace and text."""
        return next(self.rows([i]))

    def rows(self, ids: Ids | None = None) -> Iterator[Row]:
        """The rows asked for (all of them by default) with their traces and texts, one after the other."""
        wanted = np.arange(len(self)) if ids is None else ids
        for commit, at, tables in self._reader.read(wanted, ("tokens", "text")):
            arrays = decode_tokens(tables["tokens"], int(commit.columns["lengths"][at]))
            text, trace = decode_document(_document(tables))
            yield Row(**vars(arrays), text=text, trace=trace)

    def read(self, ids: Ids, places: bool = True) -> list[RowArrays]:
        """The arrays of many rows, in the order asked; reads run concurrently. places=False: parts and spans are
        empty."""
        return [decode_tokens(tables["tokens"], int(commit.columns["lengths"][at]), places)
                for commit, at, tables in self._reader.read(ids, ("tokens",))]

    def traces(self, ids: Ids | None = None) -> Iterator[Trace]:
        """The traces of the rows asked for (all of them by default), one after the other."""
        wanted: Iterable[int] = range(len(self)) if ids is None else ids
        for _, _, tables in self._reader.read(np.fromiter(wanted, np.int64), ("text",)):
            yield decode_document(_document(tables))[1]

    def writer(self, shard_rows: int = 256, shard_tokens: int = SHARD_TOKENS) -> StoreWriter:
        """A writer that continues after the last committed shard. One at a time: of two that race for a shard, one
        gets an error. A shard ends at `shard_rows` rows or once it holds `shard_tokens` tokens."""
        self.refresh()
        return StoreWriter(self._shards, shard_rows, shard_tokens)

    def signals(self) -> list[str]:
        """Names of the signals."""
        return sorted({k.split("/")[0] for k in self.kv.keys("signals/") if k.endswith("/header.json")})

    def signal(self, name: str) -> SignalReader:
        """A signal by name. Raises ValueError with the names there are."""
        key = f"signals/{_signal_name(name)}/header.json"
        data = self.kv.read(key)
        if data is None:
            raise ValueError(f"{self.url} has no signal {name!r}; it has: {', '.join(self.signals()) or 'none'}")
        header = SignalHeader.from_json(unseal(data, f"{self.url}: {key}")["header"])
        return SignalReader(name, header, self._shards, Shards(self.kv, f"signals/{name}/", seal_id(data)))

    def write_head(self, name: str, head: StoredHead) -> dict[str, Any]:
        """Store the teacher's head of a hidden signal, before its writer is made with what this returns."""
        return write_head(self.kv, _signal_name(name), head)

    def signal_writer(self, name: str, header: SignalHeader) -> SignalWriter:
        """A writer for a new signal, or one that continues an interrupted one: its header must be the same."""
        key = f"signals/{_signal_name(name)}/header.json"
        data = seal({"header": header.to_json()}, "the signal's header")
        if not self.kv.write_new(key, data):
            old, new = self.signal(name).header.to_json(), header.to_json()
            changed = [f"{k}: {old[k]!r} there, {new[k]!r} asked" for k in old
                       if canonical(old[k]) != canonical(new[k])]
            raise ValueError(f"{self.url}: signal {name!r} was begun with another header ({'; '.join(changed)}); "
                             "give the new one another name")
        return SignalWriter(self._shards, Shards(self.kv, f"signals/{name}/", seal_id(data)), header)

    def verify(self) -> None:
        """Read and check every byte of the store and its signals. Raises CorruptShard for the first damage."""
        fresh = TraceStore.open(self.url)
        for commit in fresh._shards.commits:
            ids = range(commit.first_row, commit.first_row + commit.rows)
            for _, at, tables in fresh._reader.read(np.array(ids), ("tokens", "text")):
                arrays = decode_tokens(tables["tokens"], int(commit.columns["lengths"][at]))
                if int(digest(arrays), 16) != int(commit.columns["digests"][at]):
                    raise CorruptShard("the row's content does not match its checksum", shard=commit.number,
                                       row=commit.first_row + at)
                decode_document(_document(tables))
            fresh._shards.verify_files(commit)
        for name in fresh.signals():
            fresh.signal(name).verify()


def _document(tables: Any) -> bytes:
    return b"".join(p.tobytes() for p in tables["text"].values())


def _signal_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"signal name {name!r}: use letters, digits, dot, dash and underscore")
    return name
