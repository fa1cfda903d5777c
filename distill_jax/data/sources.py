"""Where batches come from: the sources of `source_specs`, opened. `batch(step)` is a pure function of the seed.

    source = open_source(Store(path="traces/", rows=8, seq_len=4096), load_tokenizer("..."), seed=0)
    source.batch(0)                                            # the global batch, NumPy
    for batch in serve(source, start_step=100): ...            # this process's rows, read ahead
"""

import itertools
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.batch import Batch
from distill_jax.data.assemble import BatchBuilder, Placed, check_supervised, decoded
from distill_jax.data.pack import Plan, plan
from distill_jax.data.pairs import UnitRows, Units, units_of
from distill_jax.data.rowset import RowSet, open_rows
from distill_jax.data.serve import Served
from distill_jax.data.source_specs import Mix, Pairs, Phases, Prefix, Source, Store
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import RowIndex, SignalHeader, SignalReader, StoredHead, TraceStore
from distill_jax.traces.trace import FLAG_EMPTY_ANSWER, FLAG_TRUNCATED, FLAG_UNTERMINATED

CUT_ANSWER = (FLAG_TRUNCATED, FLAG_UNTERMINATED, FLAG_EMPTY_ANSWER)


def splitmix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64: a good hash of integers (splitmix64)."""
    x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def held_out(groups: Sequence[str], share: float) -> np.ndarray:
    """bool [N]: rows whose question is held out, by a hash of `Trace.group` alone."""
    return _drawn(groups, share, b"holdout")


def _drawn(groups: Sequence[str], share: float, why: bytes) -> np.ndarray:
    """bool [N]: a share of the questions, the same for every seed; another `why` draws others."""
    limit = int(share * 2**64)
    number = lambda g: int.from_bytes(blake2b(g.encode(), digest_size=8, person=why).digest(), "little")
    known = {g: number(g) < limit for g in set(groups)}
    return np.array([known[g] for g in groups], bool)


def kept_lengths(rowset: RowSet, prefix: Prefix, groups: Sequence[str]) -> np.ndarray:
    """int32 [N]: tokens of each row that `prefix` keeps. `of="written"` reads every row once. groups: of the rows."""
    length = rowset.lengths.astype(np.int64)
    first = np.zeros_like(length) if prefix.of == "row" else rowset.first_written()
    first = np.minimum(first, length - 1)  # nothing written: the row counts as its prompt and one token
    kept = first + np.maximum(1, np.floor(prefix.share * (length - first) + 1e-9)).astype(np.int64)
    return np.where(_drawn(groups, prefix.whole, b"whole"), length, kept).astype(np.int32)


def choose(index: RowIndex, spec: Store) -> tuple[np.ndarray, dict[str, int]]:
    """(numbers of the rows the filters keep, why the others were left out)."""
    none = np.zeros(len(index.lengths), bool)
    held = held_out(index.groups, spec.holdout) if spec.holdout else none
    cut = np.array([any(f in CUT_ANSWER for f in flags) for flags in index.flags], bool)
    reasons = {
        "other split": {"train": held, "heldout": ~held, "all": none}[spec.split],
        "verdict": {"correct": index.verdicts != 1, "not_wrong": index.verdicts == 0, "any": none}[spec.verdict],
        "answer cut": none if spec.over_long == "cut" else cut}
    left_out: dict[str, int] = {}
    keep = ~none
    for reason, bad in reasons.items():
        left_out[reason] = int((keep & bad).sum())
        keep &= ~bad
    chosen = np.flatnonzero(keep)
    if spec.max_rows is not None and len(chosen) > spec.max_rows:
        left_out["max_rows"] = len(chosen) - spec.max_rows
        chosen = np.sort(chosen[np.argsort(splitmix(chosen), kind="stable")[:spec.max_rows]])
    return chosen, {k: v for k, v in left_out.items() if v}


SMALL_STORE = 256 * 2**20
"""Bytes of decoded rows up to which a source keeps them: later epochs of a small store decode nothing again."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A `Retokenised` view with its tokenizer at hand. seq_len: tokens of its sequences."""

    tokenizer: Tokenizer
    seq_len: int


Readings = Mapping[str, Reading]


class PerToken(NamedTuple):
    """A number for each token of each row: `rows[i]` is as long as row i."""

    dtype: Any
    rows: Sequence[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """One store, opened: its rows, the plan over them, and its signals.

    others  {view: the rows in other tokens}
    fields  `Stream.fields` by name: what rollouts say of their tokens
    units   rows that stand together in a sequence, and the fields they have
    """

    spec: Store
    rowset: RowSet
    others: Mapping[str, RowSet] = field(default_factory=dict)
    fields: dict[str, PerToken] = field(default_factory=dict)
    units: Units | None = None
    plan: Plan
    signals: dict[str, SignalReader]
    left_out: dict[str, int]
    coverage: float = 1.0
    _kept: dict[int, Placed] = field(default_factory=dict, repr=False, compare=False)

    def sequences(self, positions: Sequence[int], signals: bool = True) -> list[list[Placed]]:
        """Rows of the sequences at these positions of the plan."""
        numbers = [self.plan.at(p) for p in positions]
        flat = np.concatenate([np.zeros(0, np.int64), *numbers])
        if not signals or not self.small:
            placed = self._read(flat, signals)
        else:
            missing = np.array([i for i in flat.tolist() if i not in self._kept], np.int64)
            self._kept.update(zip(missing.tolist(), map(decoded, self._read(missing, signals))))
            placed = [self._kept[i] for i in flat.tolist()]
        ends = np.cumsum([len(n) for n in numbers])
        return [placed[end - len(n):end] for n, end in zip(numbers, ends)]

    @property
    def small(self) -> bool:
        outcomes = sum(max(1, r.header.k) for r in self.signals.values())
        return self.plan.tokens * (16 * (1 + len(self.others)) + 4 * len(self.dtypes) + 8 * outcomes) <= SMALL_STORE

    def _read(self, numbers: np.ndarray, signals: bool) -> list[Placed]:
        begun = {n: self.rowset.read_signal(r, numbers) for n, r in self.signals.items() if signals}
        rows = self.rowset.read(numbers, places=False)
        said = {n: read(rows) for n, read in begun.items()}
        others = {view: rowset.read(numbers) for view, rowset in self.others.items()}
        paired = self.units.fields(numbers.tolist(), rows) if self.units else [{}] * len(rows)
        return [Placed(row=row, row_id=int(self.rowset.origin[i]), signals={n: s[j] for n, s in said.items()},
                       others={view: r[j] for view, r in others.items()},
                       fields={name: f.rows[i] for name, f in self.fields.items()} | paired[j])
                for j, (i, row) in enumerate(zip(numbers.tolist(), rows))]

    @property
    def dtypes(self) -> dict[str, Any]:
        """{field: dtype} of `Stream.fields`."""
        return {name: f.dtype for name, f in self.fields.items()} | (self.units.dtypes if self.units else {})

    def describe(self) -> dict[str, Any]:
        p = self.plan
        return {"path": self.spec.path, "rows": len(self.rowset), "left_out": self.left_out,
                "dropped_over_long": p.dropped, "cut_over_long": p.cut, "sequences": p.sequences,
                "kept": round(float(self.rowset.lengths.sum() / max(1, self.rowset.whole.sum())), 4),
                "tokens_per_epoch": p.tokens, "fill": round(p.fill, 4), "rendered": "stored" if self.rowset.stored
                else "again", "signals": sorted(self.signals), "signal_coverage": round(self.coverage, 4),
                "rows_without_signal": int((~self.rowset.attached).sum()) if self.signals else 0,
                **(self.units.about if self.units else {}),
                **{f"tokens_per_epoch/{v}": int(r.lengths[p.rows].sum()) for v, r in self.others.items()}}


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Batches by step. rows, seq_len: shape of the global batch; signals: name -> header.

    shares hold from step `since` on; `taken` sequences of each part were read before it. See `data.mixture`.
    """

    parts: tuple[RowSource, ...]
    rows: int
    seq_len: int
    tokenizer: Tokenizer
    signals: dict[str, SignalHeader]
    readings: Readings = field(default_factory=dict)
    shares: tuple[float, ...] = (1.0,)
    taken: tuple[int, ...] = ()
    since: int = 0
    _state: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def batch_size(self) -> int:
        return self.rows

    def head(self, signal: str) -> StoredHead:
        """The teacher's head of a signal of hidden states: one for all stores."""
        return self.parts[0].signals[signal].head()

    @property
    def steps_per_epoch(self) -> float:
        """Steps until the first store has been seen once."""
        return self.parts[0].plan.sequences / (self.rows * self.shares[0])

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of a step, or only some of its rows. Raises ValueError when the first batch asked for
        has nothing to train on."""
        out = self._build(self.assigned(step)[rows if rows is not None else slice(None)], signals=True)
        if not self._state.get("checked"):
            check_supervised(out if rows is None else self._build(self.assigned(step), signals=False), self.tokenizer)
            self._state["checked"] = True
        return out

    def _build(self, assigned: Sequence[tuple[int, int]], signals: bool) -> Batch:
        builder = BatchBuilder(len(assigned), self.seq_len, self.signals if signals else {},
                               {view: r.seq_len for view, r in self.readings.items()}, self._fields)
        for number, part in enumerate(self.parts):
            where = [b for b, (p, _) in enumerate(assigned) if p == number]
            for b, placed in zip(where, part.sequences([assigned[b][1] for b in where], signals)):
                builder.put(b, placed)
        return builder.batch()

    @property
    def _fields(self) -> dict[str, Any]:
        """{field: dtype} of all parts; one without it has zeros there."""
        return {name: dtype for part in self.parts for name, dtype in part.dtypes.items()}

    def assigned(self, step: int) -> list[tuple[int, int]]:
        """(part, position in its plan) of each sequence of the global batch."""
        if len(self.parts) == 1:
            return [(0, step * self.rows + b) for b in range(self.rows)]
        if step < self.since:
            raise ValueError(f"this mixture holds from update {self.since} on, asked for {step}")
        order, _ = _rota(self.shares)
        first = (step - self.since) * self.rows
        parts = [int(order[p % len(order)]) for p in range(first, first + self.rows)]
        return [(part, int(self._read_before(p)[part])) for p, part in enumerate(parts, first)]

    def taken_before(self, step: int) -> tuple[int, ...]:
        """Sequences of each part that the steps before `step` read."""
        return tuple(int(n) for n in self._read_before((step - self.since) * self.rows))

    def _read_before(self, position: int) -> np.ndarray:
        """int64 [parts]: sequences of each part before a position of the mixed stream, counted from `since`."""
        order, counts = _rota(self.shares)
        cycle, at = divmod(position, len(order))
        return cycle * counts[-1] + counts[at] + np.array(self.taken or (0,) * len(self.parts), np.int64)

    def mixed(self, state: Mapping[str, Any]) -> "BatchSource":
        """The same stores in the shares of a `data.mixture` state."""
        return replace(self, shares=tuple(float(x) for x in state["shares"]), since=int(state["since"]),
                       taken=tuple(int(x) for x in state["taken"]))

    def describe(self) -> list[dict[str, Any]]:
        """What was opened, for logs and `plan`."""
        return [part.describe() for part in self.parts]


@dataclass(frozen=True, kw_only=True)
class PhasedSource:
    """Opened `Phases`: batch sources one after the other, each from its own step 0. starts: their first steps."""

    parts: tuple[BatchSource, ...]
    starts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    batch_size = rows

    @property
    def seq_len(self) -> int:
        return self.parts[0].seq_len

    @property
    def signals(self) -> dict[str, SignalHeader]:
        return self.parts[0].signals

    @property
    def readings(self) -> Readings:
        return self.parts[0].readings

    def head(self, signal: str) -> StoredHead:
        return self.parts[0].head(signal)

    @property
    def steps_per_epoch(self) -> float:
        """Steps until the last source, which goes on to the end, has been seen once."""
        return self.starts[-1] + self.parts[-1].steps_per_epoch

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """As `BatchSource.batch`, from the source whose phase the step falls into."""
        phase = bisect_right(self.starts, step) - 1
        return self.parts[phase].batch(step - self.starts[phase], rows)

    def describe(self) -> list[dict[str, Any]]:
        return [{"from_step": start} | about for start, part in zip(self.starts, self.parts)
                for about in part.describe()]


ROTA = 1000


@lru_cache
def _rota(shares: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(part of each of ROTA consecutive sequences, how many of each part came before [ROTA+1, parts])."""
    share = np.array(shares) / sum(shares)
    counts = np.zeros((ROTA + 1, len(share)), np.int64)
    order = np.zeros(ROTA, np.int64)
    for i in range(ROTA):  # the part that lags its share most comes next
        order[i] = np.argmax(share * (i + 1) - counts[i])
        counts[i + 1] = counts[i]
        counts[i + 1, order[i]] += 1
    return order, counts


def open_source(spec: Source, tokenizer: Tokenizer, *, seed: int, readings: Readings | None = None
                ) -> BatchSource | PhasedSource:
    """Open the stores, check that they fit the tokenizer, and plan. readings: further views by name, in the tokens of
    other models. Raises ValueError saying what does not fit."""
    readings = dict(readings or {})
    if isinstance(spec, Phases):
        opened = [_open_source(s, tokenizer, seed, readings) for s in spec.sources]
        signals = _headers([part for source in opened for part in source.parts])
        return PhasedSource(parts=tuple(replace(source, signals=signals) for source in opened),
                            starts=(0, *itertools.accumulate(spec.steps)))
    return _open_source(spec, tokenizer, seed, readings)


def _open_source(spec: Store | Mix, tokenizer: Tokenizer, seed: int, readings: Readings) -> BatchSource:
    specs = (spec,) if isinstance(spec, Store) else spec.sources
    weights = (1.0,) if isinstance(spec, Store) else spec.weights
    parts = tuple(open_store(s, tokenizer, seed=seed, readings=readings) for s in specs)
    return BatchSource(parts=parts, rows=spec.rows, seq_len=spec.seq_len, tokenizer=tokenizer, readings=readings,
                       signals=_headers(parts), shares=tuple(w / sum(weights) for w in weights))


def open_store(spec: Store, tokenizer: Tokenizer, *, seed: int, readings: Readings | None = None) -> RowSource:
    """One store of a source."""
    path = spec.path
    if "://" not in path and not Path(path).exists():
        raise ValueError(f"no trace store at {path!r}: there is no such folder")
    store = TraceStore.open(path)
    chosen, left_out = choose(store.index(), replace(spec, max_rows=None) if isinstance(spec, Pairs) else spec)
    if len(chosen) == 0:
        raise ValueError(f"{path}: none of {len(store)} rows is left: {json.dumps(left_out)}. Relax verdict= (it is "
                         f"{spec.verdict!r}), over_long= or holdout=.")
    rowset = open_rows(store, chosen, tokenizer, spec.style, spec.ops, seed)
    signals = {name: store.signal(name) for name in spec.signals}
    for name, reader in signals.items():
        if len(reader) < len(store):
            raise ValueError(f"{path}: signal {name!r} has {len(reader)} of {len(store)} rows; finish it with "
                             f"`distill-jax score`, which continues where it stopped")
    coverage = rowset.coverage() if signals else 1.0
    if spec.prefix is not None:
        if readings:
            raise ValueError(f"a prefix keeps a share of the tokens, which in view {next(iter(readings))!r} are "
                             "others: drop prefix= or the view")
        groups = store.index().groups
        rowset = rowset.cut(kept_lengths(rowset, spec.prefix, [groups[i] for i in rowset.origin]))
    others = {view: open_rows(store, chosen, r.tokenizer, spec.style, spec.ops, seed)
              for view, r in (readings or {}).items()}
    units = units_of(spec, rowset, store.index(), seed) if isinstance(spec, Pairs) else None
    if units is not None:
        rowset, others = UnitRows(rowset, units), {view: UnitRows(r, units) for view, r in others.items()}
    room = None
    for view, r in (readings or {}).items():  # as many places of `main` as the row takes of the other view
        taken = -(-others[view].lengths.astype(np.int64) * spec.seq_len // r.seq_len)
        room = taken if room is None else np.maximum(room, taken)
    whole = readings or units
    add = units.sums if units else np.asarray  # what is planned: units, or rows
    made = plan(add(rowset.lengths), seq_len=spec.seq_len, seed=seed, pack=spec.pack,
                room=None if room is None else add(room), over_long="drop" if whole else spec.over_long)
    if units is not None:
        units, made = replace(units, pair_ids=units.placed(made)), made.of_members(units.starts)
    return RowSource(spec=spec, rowset=rowset, others=others, units=units, plan=made, signals=signals,
                     left_out=left_out, coverage=coverage)


def _headers(parts: Sequence[RowSource]) -> dict[str, SignalHeader]:
    """Signals of all parts by name; where they differ in k, the widest."""
    out: dict[str, SignalHeader] = {}
    for part in parts:
        for name, reader in part.signals.items():
            here, other = reader.header, out.get(name)
            if other is not None and other.kind != here.kind:
                raise ValueError(f"signal {name!r} is {other.kind} in one store and {here.kind} in {part.spec.path}")
            if other is not None and other.head != here.head:
                raise ValueError(f"signal {name!r} was made with another head in {part.spec.path}: only hidden states "
                                 "of one teacher can be mixed")
            if other is None or here.k > other.k:
                out[name] = here
    return out


def serve(source: BatchSource | PhasedSource, start_step: int = 0, process_index: int = 0, process_count: int = 1, *,
          stop_step: int | None = None, threads: int = 4, ahead: int = 4) -> Served:
    """Iterate over this process's rows of the batches from `start_step` on; see `data.serve`."""
    return Served(source.batch, source.rows, start_step, process_index, process_count, stop_step=stop_step,
                  threads=threads, ahead=ahead)
