"""Static partitions of a teacher job: N processes that know nothing of each other, and a join.

Part I of N scores the store's shards from `I * shards // N` on, into a folder of its own below the store:

    parts/<signal>/00003-of-00016/part.json        what it was begun with: store, header of the signal
    parts/<signal>/00003-of-00016/000012.npz       one shard's rows as the teacher gave them, and its sums
    parts/<signal>/00003-of-00016/signals/...      of hidden states: the head

`join` gives these rows to the writer that a single process uses, so the signal has the same bytes whatever N was.
"""

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from distill_jax.traces.store import CorruptShard, SignalHeader, SignalRow, TraceStore
from distill_jax.traces.store.heads import read_head
from distill_jax.traces.store.kv import Kv
from distill_jax.traces.store.sealed import canonical, seal, unseal
from distill_jax.traces.store.shards import Commit
from distill_jax.traces.store.signals import ROWS

T = TypeVar("T")
ABOUT, TALLY, BF16 = "part.json", "tally", ":bf16"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `index` (0 to count - 1) of `count`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"part {self}: expected I/N with I from 0 to N - 1, as 0/4, 1/4, 2/4, 3/4")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder(self) -> str:
        return f"{self.index:05d}-of-{self.count:05d}"

    def cut(self, items: Sequence[T]) -> Sequence[T]:
        """Its share of `items`, consecutive ones."""
        a, b = (len(items) * i // self.count for i in (self.index, self.index + 1))
        return items[a:b]

    def of(self, shards: Sequence[Commit]) -> list[Commit]:
        """Its shards, those without rows left out."""
        return [c for c in self.cut(shards) if c.rows]

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str] = os.environ) -> "Part | None":
        """`3/16`; `auto`: the task of a SLURM array; `auto/16`: that or JOB_COMPLETION_INDEX; empty: None."""
        if not text:
            return None
        index, _, count = text.partition("/")
        if index == "auto":
            index, found = _environment(environ)
            count = count or found
            if found and count != found:
                raise ValueError(f"--part {text}: the SLURM array has {found} tasks; give --part auto")
            if not count:
                raise ValueError("--part auto: JOB_COMPLETION_INDEX does not say of how many; give --part auto/N")
        try:
            return cls(index=int(index), count=int(count))
        except ValueError as e:
            raise e if str(e).startswith("part ") else ValueError(
                f"--part {text}: expected I/N as 3/16, auto or auto/N") from None


def _environment(environ: Mapping[str, str]) -> tuple[str, str]:
    if "SLURM_ARRAY_TASK_ID" in environ:
        task, first = (int(environ.get(f"SLURM_ARRAY_TASK_{k}", 0)) for k in ("ID", "MIN"))
        last, count = (int(environ.get(f"SLURM_ARRAY_TASK_{k}", -1)) for k in ("MAX", "COUNT"))
        if last - first + 1 != count:
            raise ValueError(f"--part auto: {count} SLURM array tasks numbered {first} to {last}; expected numbers "
                             "without gaps, as --array=0-15, or give --part I/N")
        return str(task - first), str(count)
    if "JOB_COMPLETION_INDEX" in environ:
        return environ["JOB_COMPLETION_INDEX"], ""
    raise ValueError("--part auto: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set; give --part I/N")


def tally_key(name: str, commit: Commit) -> str:
    """Where the sums of a shard of signal `name` stand."""
    return f"signals/{name}/tallies/{commit.number:06d}.json"


class PartFolder:
    """One part of one signal."""

    def __init__(self, store: TraceStore, name: str, part: Part) -> None:
        self.store, self.name, self.part = store, name, part
        self.kv = Kv(f"{store.url.rstrip('/')}/parts/{name}/{part.folder}")

    def begin(self, header: SignalHeader) -> None:
        """Raises ValueError where it, or another part, was begun with another store, header or number of parts."""
        about = {"store": self.store.fingerprint(), "shards": len(self.store.shards), "header": header.to_json()}
        siblings = [p for p in found(self.store, self.name) if p != self.part]
        for other in siblings:
            if other.count != self.part.count:
                raise ValueError(f"{self.store.url}: signal {self.name!r} was begun in {other.count} parts, this is "
                                 f"part {self.part}; go on with those, or delete parts/{self.name}/")
            _same(PartFolder(self.store, self.name, other), about, f"part {self.part}")
        if not self.kv.write_new(ABOUT, seal(about, "the part's header")):
            _same(self, about, "this start")

    def joined(self, header: SignalHeader) -> bool:
        """Whether the signal is whole already, with this header: a part that is started again has nothing to do."""
        if self.name not in self.store.signals():
            return False
        there = self.store.signal(self.name)
        return len(there) == len(self.store) and canonical(there.header.to_json()) == canonical(header.to_json())

    def about(self) -> dict[str, Any] | None:
        data = self.kv.read(ABOUT)
        return None if data is None else dict(unseal(data, f"{self.kv.url}: {ABOUT}"))

    def done(self) -> set[int]:
        """Numbers of the shards it has."""
        return {int(k[:-4]) for k in self.kv.keys("") if k.endswith(".npz") and k[:-4].isdigit()}

    def write(self, commit: Commit, signals: Sequence[SignalRow], tally: Mapping[str, Any]) -> None:
        """A shard's rows and sums, at once."""
        arrays: dict[str, np.ndarray] = {TALLY: np.frombuffer(json.dumps(tally).encode(), np.uint8)}
        for i, signal in enumerate(signals):
            for field, value in signal.arrays().items():
                narrow = value.dtype == ml_dtypes.bfloat16  # which npz does not know
                arrays[f"{i}.{field}{BF16 * narrow}"] = value.view(np.uint16) if narrow else value
        out = io.BytesIO()
        np.savez(out, **arrays)  # pyright: ignore[reportArgumentType]
        self.kv.write_many({f"{commit.number:06d}.npz": out.getvalue()})

    def read(self, commit: Commit, kind: str) -> tuple[list[SignalRow], bytes]:
        """What `write` wrote: rows, and the sums as JSON. Raises CorruptShard."""
        key = f"{commit.number:06d}.npz"
        rows: list[dict[str, np.ndarray]] = [{} for _ in range(commit.rows)]
        try:
            with np.load(io.BytesIO(self.kv.read(key) or b"")) as arrays:
                for name in arrays.files:
                    if name != TALLY:
                        number, _, field = name.removesuffix(BF16).partition(".")
                        value = arrays[name]
                        rows[int(number)][field] = value.view(ml_dtypes.bfloat16) if name.endswith(BF16) else value
                return [ROWS[kind](**r) for r in rows], arrays[TALLY].tobytes()
        except (ValueError, EOFError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as e:
            raise CorruptShard(f"{self.kv.url}: {key} of part {self.part} is damaged ({e}); delete it and run the part "
                               "again", shard=commit.number) from None


def found(store: TraceStore, name: str) -> list[Part]:
    """Parts of a signal that were begun."""
    folders = sorted({k.split("/")[0] for k in store.kv.keys(f"parts/{name}/") if k.endswith(f"/{ABOUT}")})
    return [Part(index=int(a), count=int(n)) for a, _, n in (f.partition("-of-") for f in folders)]


def _same(folder: PartFolder, about: Mapping[str, Any], who: str) -> None:
    there = folder.about() or {}
    changed = [k for k in about if canonical(there.get(k)) != canonical(about[k])]
    if changed:
        raise ValueError(f"{folder.store.url}: part {folder.part} of signal {folder.name!r} was begun with another "
                         f"{' and '.join(changed)} than {who}; delete parts/{folder.name}/ and score it again")


def join(store: TraceStore, name: str) -> int:
    """Make the signal of its parts, then delete them; the same call continues, or finds it done. Returns the rows.

    Raises ValueError naming the parts that are missing or unfinished, or that do not belong together.
    """
    parts = found(store, name)
    if not parts:
        if name in store.signals() and len(store.signal(name)) == len(store):
            return len(store)
        raise ValueError(f"{store.url} has no parts of a signal {name!r}; score them with --part I/N")
    counts = sorted({p.count for p in parts})
    if len(counts) > 1:
        raise ValueError(f"{store.url}: signal {name!r} has parts of {' and of '.join(map(str, counts))}; delete those "
                         f"of one number below parts/{name}/")
    folders = [PartFolder(store, name, Part(index=i, count=counts[0])) for i in range(counts[0])]
    _require_whole(store, folders)
    first = PartFolder(store, name, parts[0])
    about = first.about() or {}
    header = SignalHeader.from_json(about["header"])
    now = {**about, "store": store.fingerprint(), "shards": len(store.shards)}
    for part in parts:
        _same(PartFolder(store, name, part), now, "the store and the other parts have now")
    if header.head is not None:
        store.write_head(name, read_head(first.kv, name, header.head))
    with store.signal_writer(name, header) as writer:
        for folder in folders:
            for commit in folder.part.of(store.shards):
                if commit.first_row < writer.next_row:
                    continue
                signals, tally = folder.read(commit, header.kind)
                store.kv.write_many({tally_key(name, commit): tally})
                for signal in signals:
                    writer.append(signal)
    store.kv.delete(f"parts/{name}/")
    return len(store)


def _require_whole(store: TraceStore, folders: Sequence[PartFolder]) -> None:
    unfinished = []
    for folder in folders:
        wanted = {c.number for c in folder.part.of(store.shards)}
        if wanted - (done := folder.done()):
            unfinished.append(f"{folder.part} ({len(wanted & done)} of {len(wanted)} shards)")
    if unfinished:
        more = f" and {len(unfinished) - 8} more" if len(unfinished) > 8 else ""
        raise ValueError(f"{store.url}: parts of signal {folders[0].name!r} are missing or unfinished: "
                         f"{', '.join(unfinished[:8])}{more}; run them again with --part")
