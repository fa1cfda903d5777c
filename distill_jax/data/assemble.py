"""Rows into the arrays of a `Batch`: the only place where per-token fields are laid side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from distill_jax.core.batch import Batch, HiddenStates, Sampled, Signal, Stream, TokenLogprob, TopK
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import RowArrays, SignalHeader, SignalRow, blank

BATCHED: dict[str, Any] = {"topk": TopK, "token": TokenLogprob, "sampled": Sampled, "hidden": HiddenStates}
"""What a signal of each kind is in a batch: the arrays of its rows that have the same names."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One row on its way into a batch. signals: name -> what the teacher said of it, aligned with it, or None."""

    row: RowArrays
    row_id: int
    signals: Mapping[str, SignalRow | None]


class BatchBuilder:
    """[B,T] arrays that are filled sequence by sequence; fields are documented in `core.batch`."""

    def __init__(self, rows: int, seq_len: int, headers: Mapping[str, SignalHeader]) -> None:
        shape = (rows, seq_len)
        self.seq_len = seq_len
        self.tokens, self.positions, self.segment_ids, self.roles, self.step_ids = (
            np.zeros(shape, np.int32) for _ in range(5))
        self.weights = np.zeros(shape, np.float32)
        self.row_ids = np.full(shape, -1, np.int32)
        self.signals: dict[str, dict[str, np.ndarray]] = {}
        self._kinds = {name: BATCHED[header.kind] for name, header in headers.items()}
        for name, header in headers.items():
            nothing = blank(header, 1).arrays()
            self.signals[name] = {field.name: np.array(np.broadcast_to(nothing[field.name][0], (
                *shape, *nothing[field.name].shape[1:]))) for field in fields(self._kinds[name])}

    def put(self, b: int, placed: Iterable[Placed]) -> None:
        """Lay rows one after the other into sequence b. A row longer than what is left is cut."""
        at = 0
        for number, p in enumerate(placed, 1):
            n = min(len(p.row.tokens), self.seq_len - at)
            where = slice(at, at + n)
            self.tokens[b, where] = p.row.tokens[:n]
            self.positions[b, where] = np.arange(n)
            self.segment_ids[b, where] = number
            self.roles[b, where] = p.row.roles[:n]
            self.step_ids[b, where] = p.row.steps[:n]
            self.weights[b, at + 1:at + n] = 1.0
            self.row_ids[b, where] = p.row_id
            for name, said in p.signals.items():
                for field, into in self.signals[name].items() if said is not None else ():
                    values = getattr(said, field)[:n]
                    into[(b, where, *(slice(k) for k in values.shape[1:]))] = values  # a store may keep fewer outcomes
            at += n

    def batch(self) -> Batch:
        main = Stream(tokens=self.tokens, positions=self.positions, segment_ids=self.segment_ids, roles=self.roles,
                      step_ids=self.step_ids, weights=self.weights, row_ids=self.row_ids)
        signals: dict[str, Signal] = {name: self._kinds[name](**a) for name, a in self.signals.items()}
        return Batch(views={"main": main}, signals=signals)


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
