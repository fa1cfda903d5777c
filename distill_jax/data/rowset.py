"""The rows of a store as one student sees them: as they are stored, or rendered again, with signals attached."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.progress import track

from distill_jax.core.roles import SUPERVISED
from distill_jax.data import align
from distill_jax.data.render import Style, render, template_id
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.ops.base import Op, Pipeline
from distill_jax.traces.store import Row, RowArrays, SignalReader, SignalRow, TraceStore, Undecoded
from distill_jax.traces.trace import Trace

READ_AT_ONCE = 4096
Said = SignalRow | Undecoded | None
ReadSignal = Callable[[Sequence[RowArrays]], list[Said]]
SAMPLE = 64  # rows whose coverage is measured before a run
FIELDS = {"tokens": np.int32, "roles": np.uint8, "steps": np.int32, "parts": np.int16, "spans": np.int32}


class FlatRows:
    """Rows as flat arrays with offsets: `arrays[name][offsets[i]:offsets[i + 1]]` is row i."""

    def __init__(self, arrays: dict[str, np.ndarray], offsets: np.ndarray) -> None:
        self.arrays = arrays
        self.offsets = offsets

    @classmethod
    def of(cls, rows: Sequence[RowArrays]) -> "FlatRows":
        lengths = [len(r.tokens) for r in rows]
        arrays = {}
        for name, dtype in FIELDS.items():
            empty = np.zeros((0, 2) if name == "spans" else 0, dtype)
            arrays[name] = np.concatenate([empty, *(np.asarray(getattr(r, name), dtype) for r in rows)])
        return cls(arrays, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets).astype(np.int32)

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[RowArrays]:
        out = []
        for n in numbers:
            where = slice(self.offsets[n], self.offsets[n + 1])
            out.append(RowArrays(**{name: np.asarray(a[where]) for name, a in self.arrays.items()}))
        return out

    def save(self, folder: Path) -> None:
        """Write to `folder`, which appears at once or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, a in {**self.arrays, "offsets": self.offsets}.items():
            np.save(temp / f"{name}.npy", a)
        try:
            temp.rename(folder)
        except OSError:  # another process was first: the content is the same
            shutil.rmtree(temp)

    @classmethod
    def load(cls, folder: Path) -> "FlatRows":
        """Memory-mapped."""
        read = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")
        return cls({name: read(name) for name in FIELDS}, np.asarray(read("offsets")))


class RowSet:
    """Chosen rows of a store for one tokenizer.

    origin    int64 [N]  row of the store each row comes from
    lengths   int32 [N]
    attached  bool [N]   whether signals apply (False: an Op changed the text after scoring)
    """

    def __init__(self, store: TraceStore, origin: np.ndarray, flat: FlatRows | None, tok: Tokenizer,
                 attached: np.ndarray | None = None, lengths: np.ndarray | None = None) -> None:
        self.store = store
        self.origin = np.asarray(origin, np.int64)
        self.flat = flat
        self.whole = store.lengths()[self.origin] if flat is None else flat.lengths
        self.lengths = self.whole if lengths is None else lengths
        self.attached = np.ones(len(self.origin), bool) if attached is None else attached
        self._tok = tok

    @cached_property
    def _map(self) -> np.ndarray | None:
        """Ids of the store's tokenizer -> this one's; asked for when a signal is attached to another rendering."""
        return align.token_map(self.store.header.tokenizer, self._tok.info())

    def __len__(self) -> int:
        return len(self.origin)

    @property
    def stored(self) -> bool:
        """Whether rows are used as the store holds them."""
        return self.flat is None

    def cut(self, lengths: np.ndarray) -> "RowSet":
        """The same rows, of each only its first `lengths` [N] tokens."""
        return RowSet(self.store, self.origin, self.flat, self._tok, self.attached, np.minimum(lengths, self.whole))

    def first_written(self) -> np.ndarray:
        """int64 [N]: index of the first token of each row that the model writes; the row's length where there is none.
        Reads every row."""
        out = self.lengths.astype(np.int64)
        for begin in range(0, len(out), READ_AT_ONCE):
            numbers = np.arange(begin, min(begin + READ_AT_ONCE, len(out)))
            for n, row in zip(numbers, self.read(numbers)):
                written = np.flatnonzero(np.isin(row.roles, SUPERVISED))
                out[n] = written[0] if len(written) else out[n]
        return out

    def read(self, numbers: np.ndarray, places: bool = True) -> list[RowArrays]:
        """Rows in the order asked. places=False: parts and spans may be empty."""
        rows = self.store.read(self.origin[numbers], places) if self.flat is None else self.flat.read(numbers)
        if self.lengths is self.whole:
            return rows
        return [RowArrays(**{name: getattr(row, name)[:n] for name in FIELDS})
                for row, n in zip(rows, self.lengths[numbers].tolist())]

    def readable(self, numbers: np.ndarray, lost: np.ndarray) -> np.ndarray:
        """bool [n]: which of these rows need none of the store's rows that are lost, bool [N]."""
        origin = self.origin[numbers]
        return ~(lost[origin] & (origin >= 0))

    def read_signal(self, reader: SignalReader, numbers: np.ndarray) -> ReadSignal:
        """Begin to read the signal of these rows. What is returned takes the rows as `read` gives them: their signal,
        aligned with them; None where a row has none, longer than the row where the row is cut."""
        numbers = np.asarray(numbers)
        ok = np.flatnonzero(self.attached[numbers] & (self.origin[numbers] < len(reader)))
        ids = self.origin[numbers[ok]]
        signals = reader.begin(ids)

        def taken(rows: Sequence[RowArrays]) -> list[Said]:
            stored = self.store.read(ids) if self.flat is not None and len(ids) else [None] * len(ids)
            out: list[Said] = [None] * len(numbers)
            for i, signal, source in zip(ok.tolist(), signals, stored):
                out[i] = signal if source is None else align.gather(
                    signal.row(), align.align(source, rows[i], self._map).index, self._map)
            return out

        return taken

    def coverage(self) -> float:
        """Share of the supervised tokens of a sample of rows that have their token in the store's rendering.
        Raises ValueError when it is too low to train on."""
        if self.flat is None:
            return 1.0
        candidates = np.flatnonzero(self.attached)
        if len(candidates) == 0:
            raise ValueError(f"the ops changed the text of all {len(self)} rows after they were scored, so none has a "
                             "signal left; score a store of the changed traces, or train on the text alone "
                             "(cross-entropy, signals=())")
        pick = candidates[np.linspace(0, len(candidates) - 1, min(SAMPLE, len(candidates))).astype(int)]
        stored = self.store.read(self.origin[pick])
        return align.require_coverage(align.align(s, t, self._map) for s, t in zip(stored, self.read(pick)))


def matches(store: TraceStore, tok: Tokenizer, style: Style) -> bool:
    """Whether the store's rows are what this tokenizer and style would render."""
    return store.header.tokenizer.get("hash") == tok.hash and store.header.template == template_id(tok, style=style)


def open_rows(store: TraceStore, chosen: np.ndarray, tok: Tokenizer, style: Style, ops: Sequence[Op],
              seed: int) -> RowSet:
    """The rows `chosen` (store row numbers). Stored tokens are used where they fit; else the traces are rendered
    again, once: the result is kept in the cache directory."""
    fits = matches(store, tok, style)
    if ops:
        return _with_ops(store, chosen, tok, style, ops, seed, fits)
    if fits:
        return RowSet(store, chosen, None, tok)
    folder = cache_dir() / "rendered" / _cache_key(store, chosen, tok, style)
    if not folder.is_dir():
        rows = _render_all(list(store.traces(chosen)), lambda t: render(t, tok, style=style))
        FlatRows.of(rows).save(folder)
    return RowSet(store, chosen, FlatRows.load(folder), tok)


def _with_ops(store: TraceStore, chosen: np.ndarray, tok: Tokenizer, style: Style, ops: Sequence[Op], seed: int,
              fits: bool) -> RowSet:
    """Apply ops to the traces. Rows whose text they leave alone keep their tokens and signals."""
    traces = [t.replace(meta={**t.meta, "_row": int(i)}) for i, t in zip(chosen, store.traces(chosen))]
    before = {int(i): t.id for i, t in zip(chosen, traces)}
    after = Pipeline(ops=tuple(ops))(traces, np.random.default_rng([seed, 2]))
    if not after:
        raise ValueError(f"the ops {Pipeline(ops=tuple(ops)).name} leave none of {len(traces)} traces")
    origin = np.array([t.meta.get("_row", -1) for t in after], np.int64)
    same = np.array([i >= 0 and before[int(i)] == t.id for i, t in zip(origin, after)], bool)
    as_stored = same & fits
    kept = dict(zip(np.flatnonzero(as_stored).tolist(), store.read(origin[as_stored]))) if as_stored.any() else {}
    fresh = [t for i, t in enumerate(after) if i not in kept]
    new = iter(_render_all(fresh, lambda t: render(t, tok, style=style)))
    rows = [kept[i] if i in kept else next(new) for i in range(len(after))]
    return RowSet(store, origin, FlatRows.of(rows), tok, attached=same)


def _render_all(traces: Sequence[Trace], one: Callable[[Trace], Row]) -> list[Row]:
    """Rendered rows in order, on all cores (encoding releases the interpreter lock)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(one, traces)
        quiet = len(traces) < 1000 or not sys.stderr.isatty()
        return list(track(results, "rendering for this tokenizer", total=len(traces), disable=quiet))


def cache_dir() -> Path:
    """Where things that can be made again are kept: $DISTILL_JAX_CACHE, else ~/.cache/distill_jax."""
    return Path(os.environ.get("DISTILL_JAX_CACHE", Path.home() / ".cache" / "distill_jax"))


def _cache_key(store: TraceStore, chosen: np.ndarray, tok: Tokenizer, style: Style) -> str:
    head = [store.header.to_json(), len(store), tok.hash, template_id(tok, style=style)]
    h = hashlib.blake2b(json.dumps(head, sort_keys=True, default=str).encode(), digest_size=12)
    h.update(store.fingerprint().encode())
    h.update(np.asarray(chosen, np.int64).tobytes())
    return h.hexdigest()
