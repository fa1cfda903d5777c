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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.batch import Batch
from distill_jax.data.assemble import BatchBuilder, Placed, check_supervised, decoded
from distill_jax.data.choosing import choose, kept_lengths
from distill_jax.data.damage import BadShard, Damage
from distill_jax.data.pack import Plan, plan
from distill_jax.data.pairs import UnitRows, Units, units_of
from distill_jax.data.rowset import RowSet, open_rows
from distill_jax.data.serve import Served
from distill_jax.data.source_specs import Mix, Pairs, Phases, Source, Store
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import CorruptShard, SignalHeader, SignalReader, StoredHead, TraceStore

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
    damage  what could not be read so far, where the spec goes on without it
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
    damage: Damage | None = None
    _kept: dict[int, Placed] = field(default_factory=dict, repr=False, compare=False)

    def sequences(self, positions: Sequence[int], signals: bool = True) -> list[list[Placed]]:
        """Rows of the sequences at these positions of the plan, without those that cannot be read."""
        numbers = [self.plan.at(p).tolist() for p in positions]
        flat = [i for n in numbers for i in n]
        if not signals or not self.small:
            found = self._read(flat, signals)
        else:
            found = self._kept
            found.update({i: decoded(p) for i, p in self._read([i for i in flat if i not in found], signals).items()})
        return [[found[i] for i in n if i in found] for n in numbers]

    @property
    def small(self) -> bool:
        outcomes = sum(max(1, r.header.k) for r in self.signals.values())
        return self.plan.tokens * (16 * (1 + len(self.others)) + 4 * len(self.dtypes) + 8 * outcomes) <= SMALL_STORE

    def _read(self, numbers: Sequence[int], signals: bool) -> dict[int, Placed]:
        """The rows of these numbers, without those that cannot be read."""
        while True:
            asked = np.array(numbers, np.int64)
            if self.damage is not None:
                asked = asked[self.rowset.readable(asked, self.damage.lost)]
            try:
                return self._placed(asked, signals)
            except CorruptShard as e:
                if self.damage is None:
                    raise
                self.damage.note(e)

    def _placed(self, numbers: np.ndarray, signals: bool) -> dict[int, Placed]:
        begun = {n: self.rowset.read_signal(r, numbers) for n, r in self.signals.items() if signals}
        rows = self.rowset.read(numbers, places=False)
        said = {n: read(rows) for n, read in begun.items()}
        others = {view: rowset.read(numbers) for view, rowset in self.others.items()}
        paired = self.units.fields(numbers.tolist(), rows) if self.units else [{}] * len(rows)
        return {i: Placed(row=row, row_id=int(self.rowset.origin[i]), signals={n: s[j] for n, s in said.items()},
                          others={view: r[j] for view, r in others.items()},
                          fields={name: f.rows[i] for name, f in self.fields.items()} | paired[j])
                for j, (i, row) in enumerate(zip(numbers.tolist(), rows))}

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

    def damaged(self) -> list[BadShard]:
        """The shards of which rows could not be read so far, where the stores' `bad_shards` goes on without them."""
        return [bad for part in self.parts if part.damage for bad in part.damage.found]

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

    def damaged(self) -> list[BadShard]:
        """As `BatchSource.damaged`."""
        return [bad for part in self.parts for bad in part.damaged()]

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
    if "://" not in spec.path and not Path(spec.path).exists():
        raise ValueError(f"no trace store at {spec.path!r}: there is no such folder")
    store = TraceStore.open(spec.path)
    damage = Damage(store, spec.signals) if spec.bad_shards == "skip" else None
    while True:
        try:
            return _open_store(spec, store, damage, tokenizer, seed, dict(readings or {}))
        except CorruptShard as e:  # where opening reads rows: it is begun again without those that cannot be read
            if damage is None:
                raise
            damage.note(e)


def _open_store(spec: Store, store: TraceStore, damage: Damage | None, tokenizer: Tokenizer, seed: int,
                readings: Readings) -> RowSource:
    path = spec.path
    chosen, left_out = choose(store.index(), replace(spec, max_rows=None) if isinstance(spec, Pairs) else spec)
    if damage is not None and (bad := int(damage.lost[chosen].sum())):
        chosen, left_out = chosen[~damage.lost[chosen]], left_out | {"cannot be read": bad}
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
              for view, r in readings.items()}
    units = units_of(spec, rowset, store.index(), seed) if isinstance(spec, Pairs) else None
    if units is not None:
        rowset, others = UnitRows(rowset, units), {view: UnitRows(r, units) for view, r in others.items()}
    room = None
    for view, r in readings.items():  # as many places of `main` as the row takes of the other view
        taken = -(-others[view].lengths.astype(np.int64) * spec.seq_len // r.seq_len)
        room = taken if room is None else np.maximum(room, taken)
    whole = readings or units
    add = units.sums if units else np.asarray  # what is planned: units, or rows
    made = plan(add(rowset.lengths), seq_len=spec.seq_len, seed=seed, pack=spec.pack,
                room=None if room is None else add(room), over_long="drop" if whole else spec.over_long)
    if units is not None:
        units, made = replace(units, pair_ids=units.placed(made)), made.of_members(units.starts)
    return RowSource(spec=spec, rowset=rowset, others=others, units=units, plan=made, signals=signals,
                     left_out=left_out, coverage=coverage, damage=damage)


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
          stop_step: int | None = None, threads: int | None = None, ahead: int | None = None) -> Served:
    """Iterate over this process's rows of the batches from `start_step` on; see `data.serve`."""
    return Served(source.batch, source.rows, start_step, process_index, process_count, stop_step=stop_step,
                  threads=threads, ahead=ahead)
