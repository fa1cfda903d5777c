"""The rows of a store as units of a preference loss: pairs of answers, or single ones, each whole in one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from distill_jax.core.roles import SUPERVISED
from distill_jax.data.pack import Plan
from distill_jax.data.rowset import FIELDS, ReadSignal, RowSet
from distill_jax.data.source_specs import Pairs
from distill_jax.traces.pairing import NOBODY, Answers, Built, build_units
from distill_jax.traces.store import RowArrays, RowIndex, SignalReader

CHOSEN, REJECTED, MISMATCHED = 1, 0, 2
DTYPES: dict[str, Any] = {"pair_ids": np.int32, "chosen": np.float32, "rejected": np.float32, "apart": np.float32}


@dataclass(frozen=True, kw_only=True)
class Units:
    """M rows in U units, and what the stream says of them.

    rows      int64 [M]    row of the store's `RowSet` each comes from, unit by unit
    written   int64 [M]    row whose written part stands behind its prompt: `rows`, but for mismatched ones
    sides     int8 [M]     CHOSEN, REJECTED or MISMATCHED
    starts    int64 [U+1]  unit u is rows starts[u] to starts[u + 1] - 1
    pair_ids  int64 [M]    number of the unit within its sequence, from 1; known when there is a plan
    about     counts, for logs
    """

    rows: np.ndarray
    written: np.ndarray
    sides: np.ndarray
    starts: np.ndarray
    about: dict[str, int]
    pair_ids: np.ndarray | None = None

    @property
    def mismatched(self) -> np.ndarray:
        return self.sides == MISMATCHED

    @property
    def dtypes(self) -> dict[str, Any]:
        """{field: dtype} of what `fields` gives."""
        return DTYPES | ({"mismatched": np.float32} if self.mismatched.any() else {})

    def sums(self, values: np.ndarray) -> np.ndarray:
        """int64 [U]: the sum of [M] over each unit."""
        return np.add.reduceat(np.asarray(values, np.int64), self.starts[:-1])

    def placed(self, plan: Plan) -> np.ndarray:
        """int64 [M]: `pair_ids` under a plan of the units; 0 where the plan left one out."""
        numbers = np.zeros(len(self.starts) - 1, np.int64)
        numbers[plan.rows] = plan.places
        return np.repeat(numbers, np.diff(self.starts))

    def fields(self, numbers: Sequence[int], rows: Sequence[RowArrays]) -> list[dict[str, np.ndarray]]:
        """Stream fields of these rows; the rows of a unit are all among them."""
        assert self.pair_ids is not None
        read = dict(zip(numbers, rows))
        out = []
        for i, row in zip(numbers, rows):
            side, n = int(self.sides[i]), len(row)
            said = {"pair_ids": 0 if side == MISMATCHED else self.pair_ids[i], "chosen": side == CHOSEN,
                    "rejected": side == REJECTED, "apart": 0, "mismatched": side == MISMATCHED}
            made = {name: np.full(n, said[name], dtype) for name, dtype in self.dtypes.items()}
            if side != MISMATCHED:
                made["apart"][first_apart(row, self._other(i, read)):] = 1
            out.append(made)
        return out

    def _other(self, i: int, read: dict[int, RowArrays]) -> RowArrays | None:
        """The other side of row i's pair."""
        for j in (i - 1, i + 1):
            if j in read and self.sides[i] + self.sides[j] == CHOSEN + REJECTED and self._unit(i) == self._unit(j):
                return read[j]
        return None

    def _unit(self, i: int) -> int:
        return int(np.searchsorted(self.starts, i, side="right"))


def first_written(row: RowArrays) -> int:
    """Index of the first token that the model writes; the row's length where there is none."""
    written = np.flatnonzero(np.isin(row.roles, SUPERVISED))
    return int(written[0]) if len(written) else len(row)


def first_apart(row: RowArrays, other: RowArrays | None) -> int:
    """Index of the first written token of `row` that differs from the other's; both keep at least one token apart.
    Where there is no other: the first written one."""
    begin = first_written(row)
    if other is None:
        return begin
    a, b = row.tokens[begin:], other.tokens[first_written(other):]
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return begin + (int(differ[0]) if len(differ) else max(0, n - 1))


class UnitRows(RowSet):
    """The rows of units, drawn from a `RowSet`: one row may be in several units; mismatched rows have the prompt of one
    and what was written of another, and no signals."""

    def __init__(self, base: RowSet, units: Units) -> None:
        own = ~units.mismatched
        lengths = base.lengths[units.rows]
        self._first = np.zeros(0, np.int64)
        if not own.all():
            self._first = base.first_written()
            made = self._first[units.rows] + base.lengths[units.written] - self._first[units.written]
            lengths = np.where(own, lengths, made).astype(np.int32)
        super().__init__(base.store, base.origin[units.rows], base.flat, base._tok, base.attached[units.rows] & own,
                         lengths)
        self.whole, self._base, self._units = lengths, base, units

    def read(self, numbers: np.ndarray, places: bool = True) -> list[RowArrays]:
        numbers = np.asarray(numbers, np.int64)
        rows = self._base.read(self._units.rows[numbers], places)
        joined = np.flatnonzero(self._units.mismatched[numbers])
        others = self._base.read(self._units.written[numbers[joined]], places) if len(joined) else []
        for at, other in zip(joined.tolist(), others):
            rows[at] = self._joined(numbers[at], rows[at], other)
        return rows

    def readable(self, numbers: np.ndarray, lost: np.ndarray) -> np.ndarray:
        """As `RowSet.readable`; a unit is read whole or not at all."""
        units = self._units
        good = self._base.readable(units.rows[numbers], lost) & self._base.readable(units.written[numbers], lost)
        unit = np.searchsorted(units.starts, numbers, side="right")
        return ~np.isin(unit, unit[~good])

    def _joined(self, number: int, prompt: RowArrays, written: RowArrays) -> RowArrays:
        a, b = self._first[self._units.rows[number]], self._first[self._units.written[number]]
        return RowArrays(**{name: np.concatenate([getattr(prompt, name)[:a], getattr(written, name)[b:]])
                            for name in FIELDS})

    def read_signal(self, reader: SignalReader, numbers: np.ndarray) -> ReadSignal:
        numbers = np.asarray(numbers, np.int64)
        base = self._base.read_signal(reader, self._units.rows[numbers])
        return lambda rows: [said if self.attached[i] else None for said, i in zip(base(rows), numbers)]


def units_of(spec: Pairs, rowset: RowSet, index: RowIndex, seed: int) -> Units:
    """The units of a store's chosen rows. Raises ValueError, with counts, where there is none."""
    there = np.flatnonzero(rowset.origin >= 0)  # an op may have made traces that no verdict is stored for
    origin = rowset.origin[there]
    scores = np.full(len(there), np.nan)
    if name := spec.build.reads:
        scores[:] = [t.scores.get(name, np.nan) for t in rowset.store.traces(origin)]
        if np.isnan(scores).all():
            known = sorted({s for t in rowset.store.traces(origin[:64]) for s in t.scores})
            raise ValueError(f"{spec.path}: no trace has the score {name!r} that {type(spec.build).__name__} reads; "
                             f"the first ones have {known}")
    answers = Answers(verdicts=index.verdicts[origin], lengths=rowset.lengths[there], scores=scores)
    built = build_units(spec.build, [index.groups[i] for i in origin], answers, seed,
                        content=index.digests[origin] if rowset.stored else _contents(rowset, there))
    if not len(built.units):
        n = [int((answers.verdicts == v).sum()) for v in (1, 0, -1)]
        raise ValueError(f"{spec.path}: {type(spec.build).__name__} finds nothing to compare: {len(there)} answers ("
                         f"{n[0]} right, {n[1]} wrong, {n[2]} unchecked) to {built.questions} questions. A store needs "
                         "judged answers, several to a question: `distill-jax generate --n 8 --keep all`; and "
                         f"verdict={spec.verdict!r} must keep them")
    if spec.max_rows is not None and len(built.units) > spec.max_rows:
        keep = np.random.default_rng([0, 5]).permutation(len(built.units))[:spec.max_rows]
        built = built._replace(units=built.units[np.sort(keep)])
    units = np.where(built.units == NOBODY, NOBODY, there[built.units])
    other = _mismatched(spec.path, units, [index.groups[i] for i in rowset.origin.tolist()], seed) if (
        spec.build.mismatched) else None
    return _laid(units, other, built)


def _contents(rowset: RowSet, numbers: np.ndarray) -> np.ndarray:
    """uint64: equal for rows of equal tokens."""
    return np.array([int.from_bytes(blake2b(np.ascontiguousarray(r.tokens).tobytes(), digest_size=8).digest(), "little")
                     for r in rowset.read(numbers)], np.uint64)


def _mismatched(path: str, units: np.ndarray, groups: Sequence[str], seed: int) -> np.ndarray:
    """int64 [U]: for each unit the row of an answer to another question: the next one in an order by the seed."""
    rows = units.max(axis=1)
    number = {g: k for k, g in enumerate(dict.fromkeys(groups))}
    order = np.random.default_rng([seed, 6]).permutation(len(rows))
    group = np.array([number[groups[int(i)]] for i in rows])[order]
    if len(set(group.tolist())) < 2:
        raise ValueError(f"{path}: answers to other questions need at least two questions with judged answers; "
                         "Singles(measure=False) goes without them")
    shift = np.ones(len(rows), np.int64)
    at = np.arange(len(rows))
    while (same := group[(at + shift) % len(rows)] == group).any():
        shift[same] += 1
    out = np.empty(len(rows), np.int64)
    out[order] = rows[order[(at + shift) % len(rows)]]
    return out


def _laid(units: np.ndarray, other: np.ndarray | None, built: Built) -> Units:
    """Units [U,2] as rows: chosen, rejected, mismatched, each where there is one."""
    extra = np.full(len(units), NOBODY, np.int64) if other is None else other
    rows = np.column_stack([units, np.where(extra == NOBODY, NOBODY, units.max(axis=1))])
    written = np.column_stack([units, extra])
    sides = np.broadcast_to(np.array([CHOSEN, REJECTED, MISMATCHED], np.int8), rows.shape)
    there = rows != NOBODY
    starts = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
    one = (units != NOBODY).sum(axis=1) == 1
    about = {"pairs": int((~one).sum()), "desirable": int((one & (units[:, 0] >= 0)).sum()),
             "undesirable": int((one & (units[:, 1] >= 0)).sum()), "questions": built.questions,
             "questions_without": built.without, "pairs_of_equal_rows": built.equal}
    about = {k: v for k, v in about.items() if v or k in ("questions", "questions_without")}
    return Units(rows=rows[there], written=written[there], sides=sides[there], starts=starts, about=about)
