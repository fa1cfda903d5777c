"""A stage of FIRST: a stored top-k signal, re-calibrated on held-out tokens, as a signal of k outcomes beside it."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from distill_jax.core.roles import SUPERVISED
from distill_jax.data.choosing import held_out
from distill_jax.eval.calibration import WAYS, Calibration, search
from distill_jax.jobs.context import RunContext
from distill_jax.traces.store import SignalHeader, TopKRow, TraceStore

GRIDS = {"temperature": (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0),
         "smoothing": (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)}
ROWS = 256
"""Rows read at once."""


def recalibrate(context: RunContext, *, store: str, signal: str = "topk64", name: str = "first5", k: int = 5,
                how: Literal["temperature", "smoothing"] = "temperature", grid: Sequence[float] = (),
                holdout: float = 0.02, max_tokens: int = 500_000, bins: int = 15) -> dict[str, Any]:
    """Choose a temperature (or smoothing) by ECE, and write the changed teacher as signal `name`.

    The signal's k outcomes are renormalised: its tail is empty. Chosen on the supervised tokens of the questions that
    `Store(holdout=...)` holds out, at most `max_tokens` of them; an outcome is right when it is the token that stands
    there. So the rows should be reference answers: on what the teacher itself sampled, T = 1 is right by construction.
    Resumes; returns the chosen value and the error of every value. Raises ValueError where there is nothing to
    calibrate on.
    """
    traces = TraceStore.open(store)
    reader: Any = traces.signal(signal)  # topk rows, once its header was looked at
    if reader.header.kind != "topk" or reader.header.k < k:
        raise ValueError(f"{store}: recalibrate reads a topk signal with at least k={k} outcomes; {signal!r} is "
                         f"{reader.header.kind} with k={reader.header.k}")
    if len(reader) < len(traces):
        raise ValueError(f"{store}: signal {signal!r} has {len(reader)} of {len(traces)} rows; finish it with "
                         "`distill-jax score`")
    rows = np.flatnonzero(held_out(traces.index().groups, holdout))
    chosen = _choose(_held_out_tokens(traces, signal, rows, k, max_tokens), how, grid or GRIDS[how], bins, store)
    params = {**reader.header.params, "from": signal, "how": how, "value": chosen.value, "holdout": holdout}
    header = SignalHeader(kind="topk", k=k, teacher=reader.header.teacher, params=params, precision="u16")
    with traces.signal_writer(name, header) as out:
        for begin in range(out.next_row, len(traces), ROWS):
            for row in reader.read(range(begin, min(begin + ROWS, len(traces)))):
                out.append(changed(row, k, how, chosen.value))
    before, after = chosen.errors[WAYS[how].identity], chosen.errors[chosen.value]
    context.say(f"[{context.folder.name}] {how} {chosen.value:g}: calibration error {before:.4f} -> {after:.4f}")
    return {"how": how, "value": chosen.value, "errors": {f"{v:g}": round(e, 6) for v, e in chosen.errors.items()}}


def changed(row: TopKRow, k: int, how: str, value: float) -> TopKRow:
    """The first k outcomes of a row, re-calibrated and renormalised; a token without outcomes stays without signal."""
    ids = np.asarray(row.ids)[:, :k]
    logprobs = WAYS[how].apply(np.where(ids >= 0, row.logprobs[:, :k], -np.inf), value).astype(np.float32)
    ids = np.where(np.isfinite(logprobs), ids, -1)
    return TopKRow(ids=ids, logprobs=logprobs, mask=np.asarray(row.mask) & (ids >= 0).any(-1))


def _held_out_tokens(store: TraceStore, signal: str, rows: np.ndarray, k: int,
                     most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(log-probs [n,k], whether the first outcome stands there [n]) of the supervised tokens, some rows at a time."""
    reader: Any = store.signal(signal)
    seen = 0
    for begin in range(0, len(rows), ROWS):
        ids = rows[begin:begin + ROWS]
        for row, said in zip(store.read(ids), reader.read(ids), strict=True):
            use = np.isin(row.roles, SUPERVISED) & said.mask & (said.ids[:, 0] >= 0)
            seen += int(use.sum())
            yield said.logprobs[use, :k], said.ids[use, 0] == row.tokens[use]
            if seen >= most:
                return


def _choose(tokens: Iterator[tuple[np.ndarray, np.ndarray]], how: str, grid: Sequence[float], bins: int,
            store: str) -> Calibration:
    parts = list(tokens)
    if not sum(len(c) for _, c in parts):
        raise ValueError(f"{store}: no held-out token to calibrate on; raise holdout=, or score the supervised roles")
    return search(WAYS[how], np.concatenate([p for p, _ in parts]), np.concatenate([c for _, c in parts]), grid, bins)
