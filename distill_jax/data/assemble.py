"""Rows into the arrays of a `Batch`: the only place where per-token fields are laid side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from distill_jax.core.batch import Batch, HiddenStates, Sampled, Signal, Stream, TokenLogprob, TopK
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import RowArrays, SignalHeader, SignalRow, Undecoded, blank, lay

BATCHED: dict[str, Any] = {"topk": TopK, "token": TokenLogprob, "sampled": Sampled, "hidden": HiddenStates}
"""What a signal of each kind is in a batch: the arrays of its rows that have the same names."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One row on its way into a batch.

    signals  name -> what the teacher said of it, aligned with it, or None
    others   view -> the same row in other tokens
    fields   further per-token arrays of the row by name: `Stream.fields` of `main`
    """

    row: RowArrays
    row_id: int
    signals: Mapping[str, SignalRow | Undecoded | None]
    others: Mapping[str, RowArrays] = field(default_factory=dict)
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)


def decoded(placed: Placed) -> Placed:
    """The same row, its signals decoded: for one that is kept."""
    return replace(placed, signals={n: s.row() if isinstance(s, Undecoded) else s for n, s in placed.signals.items()})


class _Lines:
    """The arrays [B,T] of one view; fields are documented in `core.batch`."""

    def __init__(self, rows: int, seq_len: int) -> None:
        self.seq_len = seq_len
        self.arrays: dict[str, Any] = {name: np.zeros((rows, seq_len), np.int32) for name in (
            "tokens", "positions", "segment_ids", "roles", "step_ids")}
        self.arrays["weights"] = np.zeros((rows, seq_len), np.float32)
        self.arrays["row_ids"] = np.full((rows, seq_len), -1, np.int32)

    def put(self, b: int, at: int, row: RowArrays, segment: int, row_id: int) -> slice:
        """Lay a row into sequence b from `at` on, cut where it ends. Where it lies."""
        n = min(len(row.tokens), self.seq_len - at)
        where = slice(at, at + n)
        values = {"tokens": row.tokens[:n], "positions": np.arange(n), "segment_ids": segment, "roles": row.roles[:n],
                  "step_ids": row.steps[:n], "row_ids": row_id}
        for name, value in values.items():
            self.arrays[name][b, where] = value
        self.arrays["weights"][b, at + 1:at + n] = 1.0
        return where


class BatchBuilder:
    """Batches that are filled sequence by sequence. others: {further view: tokens of its sequences}; further:
    {field of the rows: its dtype}."""

    def __init__(self, rows: int, seq_len: int, headers: Mapping[str, SignalHeader],
                 others: Mapping[str, int] | None = None, further: Mapping[str, Any] | None = None) -> None:
        self.fields = {name: np.zeros((rows, seq_len), dtype) for name, dtype in (further or {}).items()}
        self.views = {name: _Lines(rows, n) for name, n in {"main": seq_len, **(others or {})}.items()}
        self._kinds = {name: BATCHED[header.kind] for name, header in headers.items()}
        self._nothing = {name: {f.name: blank(header, 1).arrays()[f.name][0] for f in fields(self._kinds[name])}
                         for name, header in headers.items()}
        self.signals = {name: {array: np.empty((rows, seq_len, *x.shape), x.dtype) for array, x in nothing.items()}
                        for name, nothing in self._nothing.items()}
        self._filled = np.zeros(rows, np.int64)  # positions of each sequence whose signals are there

    def put(self, b: int, placed: Iterable[Placed]) -> None:
        """Lay rows one after the other into sequence b. A row longer than what is left is cut."""
        at = dict.fromkeys(self.views, 0)
        for number, p in enumerate(placed, 1):
            for view, lines in self.views.items():
                row = p.row if view == "main" else p.others[view]
                where = lines.put(b, at[view], row, number, p.row_id)
                at[view] = where.stop
                if view == "main":
                    self._put_signals(b, where, p.signals)
                    for name, values in p.fields.items():
                        self.fields[name][b, where] = values[:where.stop - where.start]

    def _put_signals(self, b: int, where: slice, signals: Mapping[str, SignalRow | Undecoded | None]) -> None:
        for name, arrays in self.signals.items():
            into = {array: x[b, where] for array, x in arrays.items()}
            said = signals.get(name)
            if said is None:
                self._leave(name, into)
            elif isinstance(said, Undecoded):
                said.lay(into)
            else:
                lay(said, into)
        self._filled[b] = where.stop

    def _leave(self, name: str, into: Mapping[str, np.ndarray]) -> None:
        """The teacher said nothing here."""
        for array, x in into.items():
            x[...] = self._nothing[name][array]

    def batch(self) -> Batch:
        for b, filled in enumerate(self._filled.tolist()):
            for name, arrays in self.signals.items():
                self._leave(name, {array: x[b, filled:] for array, x in arrays.items()})
        signals: dict[str, Signal] = {name: self._kinds[name](**a) for name, a in self.signals.items()}
        fields = {"main": self.fields}
        return Batch(views={name: Stream(**lines.arrays, fields=fields.get(name, {}))
                            for name, lines in self.views.items()}, signals=signals)


def by_role(tokens: np.ndarray, roles: np.ndarray, tok: Tokenizer) -> list[tuple[Role, str]]:
    """Runs of one role of a sequence [T] with their decoded text."""
    roles = np.asarray(roles)
    edges = np.flatnonzero(np.diff(roles)) + 1
    spans = zip([0, *edges.tolist()], [*edges.tolist(), len(roles)])
    return [(Role(int(roles[a])), tok.decode(tokens[a:b]) if roles[a] else f"{b - a} tokens of padding")
            for a, b in spans if b > a]


def check_supervised(batch: Batch, tok: Tokenizer, on: Sequence[Role] = SUPERVISED) -> None:
    """Raises ValueError with a decoded row when no token of the batch can carry a loss."""
    main: Any = batch.main
    if (np.isin(main.roles, [int(r) for r in on]) & (main.weights > 0)).any():
        return
    lines = [f"  {role.name:10} {text[:300]!r}" for role, text in by_role(main.tokens[0], main.roles[0], tok)[:40]]
    names = ", ".join(r.name for r in on)
    raise ValueError(f"nothing to train on: no token of the batch has one of the roles {names}. The first row:\n"
                     + "\n".join(lines) + "\nIs thinking or answer missing from the traces, or do filters or a "
                     "prefix keep only prompts? `distill-jax doctor` looks further.")
