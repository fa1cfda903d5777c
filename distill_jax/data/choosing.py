"""Which rows of a store a source takes, and how much of each: by hashes and the row index alone."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from distill_jax.data.rowset import RowSet
from distill_jax.data.source_specs import Prefix, Store
from distill_jax.traces.store import RowIndex
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
