"""Rows into the arrays of a `Batch`: the only place where per-token fields are laid side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_jax.core.batch import Batch, Signal, Stream, TokenLogprob, TopK
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import RowArrays, SignalHeader


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One row on its way into a batch. signals: name -> arrays aligned with the row, or None."""

    row: RowArrays
    row_id: int
    signals: Mapping[str, tuple | None]


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
        for name, header in headers.items():
            arrays: dict[str, np.ndarray] = {"mask": np.zeros(shape, bool)}
            if header.kind == "topk":
                arrays["ids"] = np.full((*shape, header.k), -1, np.int32)
                arrays["logprobs"] = np.full((*shape, header.k), -np.inf, np.float32)
            else:
                arrays["logprobs"] = np.zeros(shape, np.float32)
            self.signals[name] = arrays

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
            for name, arrays in p.signals.items():
                if arrays is not None:
                    self._put_signal(self.signals[name], b, where, n, arrays)
            at += n

    @staticmethod
    def _put_signal(into: dict[str, np.ndarray], b: int, where: slice, n: int, arrays: tuple) -> None:
        if len(arrays) == 3:
            ids, logprobs, mask = arrays
            k = ids.shape[1]
            into["ids"][b, where, :k] = ids[:n]
            into["logprobs"][b, where, :k] = logprobs[:n]
        else:
            logprobs, mask = arrays
            into["logprobs"][b, where] = logprobs[:n]
        into["mask"][b, where] = mask[:n]

    def batch(self) -> Batch:
        main = Stream(tokens=self.tokens, positions=self.positions, segment_ids=self.segment_ids, roles=self.roles,
                      step_ids=self.step_ids, weights=self.weights, row_ids=self.row_ids)
        signals: dict[str, Signal] = {
            name: TopK(**a) if "ids" in a else TokenLogprob(**a) for name, a in self.signals.items()}
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
