"""Teacher signals beside the rows: what a teacher said about each token, under `signals/<name>/`.

A signal has its own header and shards with the row ids and shard boundaries of the store. Every signal row's checksum
is seeded with the content checksum of the row it was made for, so it cannot be read beside a different one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

import distill_jax.traces.store.quantise as quantise

MAX_K = 4096
COUNTS = "counts"
"""Precision of a `sampled` signal whose draws all count the same: how often each id was drawn, exact."""
STATES = {"bf16": 2, "int8": 1}
"""Precisions of hidden states, and bytes a number."""
_GRADES = tuple(quantise.PRECISIONS)
KINDS = {"topk": _GRADES, "token": ("u16", *_GRADES), "sampled": (COUNTS, *_GRADES), "hidden": tuple(STATES)}
"""Precisions each kind of signal can have, its default first."""


@dataclass(frozen=True, kw_only=True)
class SignalHeader:
    """What a signal is and who made it; immutable once written.

    kind       `topk`: the k most probable outcomes; `token`: the log-prob of the token that stands there; `sampled`:
               outcomes drawn from the teacher; `hidden`: the teacher's final states, its head stored beside them
    k          outcomes kept at most (topk), draws (sampled), width of the states (hidden), 0 for token
    teacher    model, revision and whatever identifies it
    params     how it was scored: template, temperature, dtype, kept mass, ... (JSON)
    precision  of log-probs and weights, see `quantise`: `u8` (default of topk), `u16` (of token), `f16`, `f32`; of
               sampled also `counts` (its default); of hidden `bf16` (its default) or `int8` with a scale a token
    head       of hidden: what `heads.write_head` returned
    """

    kind: str
    k: int = 0
    teacher: Mapping[str, Any] | str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    precision: str = ""
    head: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown signal kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        most = {"topk": MAX_K, "sampled": MAX_K, "hidden": 1 << 20, "token": 0}[self.kind]
        if not min(most, 1) <= self.k <= most:
            raise ValueError(f"a {self.kind} signal cannot have k={self.k}: topk and sampled take 1 to {MAX_K}, "
                             "hidden the width of the states, token 0")
        if not self.precision:
            object.__setattr__(self, "precision", KINDS[self.kind][0])
        if self.precision not in KINDS[self.kind]:
            raise ValueError(f"unknown precision {self.precision!r} of a {self.kind} signal; expected one of "
                             f"{', '.join(dict.fromkeys(KINDS[self.kind]))}")
        if (self.kind == "hidden") != (self.head is not None):
            raise ValueError("a hidden signal needs the teacher's head, and no other signal has one")

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if self.head is None:  # headers written before there were hidden signals stay the same to the byte
            del value["head"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SignalHeader":
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class SignalRow:
    """What a teacher said about each of the T tokens of a row: arrays [T, ...] of which `mask` is always one.

    empty  what stands in each array where the teacher said nothing
    """

    mask: np.ndarray

    empty: ClassVar[Mapping[str, Any]] = {"mask": False}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name; optional ones that were not given are left out."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def at(self, index: np.ndarray) -> Any:
        """The row whose token t is this one's token `index[t]`, int [T']; -1: the teacher said nothing."""
        moved = {name: x[index] for name, x in self.arrays().items()}
        said = (index >= 0) & moved["mask"]
        for name, x in moved.items():
            x[~said] = self.empty[name]
        return type(self)(**moved)


@dataclass(frozen=True, kw_only=True)
class TopKRow(SignalRow):
    """The k most probable outcomes at each of T tokens, most probable first.

    ids       int32 [T,K]    token ids, -1 where fewer than K are kept
    logprobs  float32 [T,K]  full-vocabulary log-probs, never renormalised; -inf where ids is -1
    mask      bool [T]       whether the teacher said anything about the token
    tail      float32 [T]    mass outside the kept outcomes, with its own accuracy (1 - sum cancels); 1 where masked.
                             None on the way in: taken as 1 - sum
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray | None = None

    empty: ClassVar[Mapping[str, Any]] = {"mask": False, "ids": np.int32(-1), "logprobs": np.float32(-np.inf),
                                          "tail": np.float32(1)}


@dataclass(frozen=True, kw_only=True)
class TokenRow(SignalRow):
    """Log-prob of the token that stands there: logprobs float32 [T] (0 where masked), mask bool [T]."""

    logprobs: np.ndarray

    empty: ClassVar[Mapping[str, Any]] = {"mask": False, "logprobs": np.float32(0)}


@dataclass(frozen=True, kw_only=True)
class SampledRow(SignalRow):
    """Outcomes drawn from the teacher at each of T tokens (random sampling KD, 2503.16870).

    ids      int32 [T,S]    distinct token ids, largest weight first, -1 where fewer than S were drawn
    weights  float32 [T,S]  shares of the draws (times their importance), summing to 1; 0 where ids is -1
    mask     bool [T]       whether the teacher said anything about the token
    """

    ids: np.ndarray
    weights: np.ndarray

    empty: ClassVar[Mapping[str, Any]] = {"mask": False, "ids": np.int32(-1), "weights": np.float32(0)}


@dataclass(frozen=True, kw_only=True)
class HiddenRow(SignalRow):
    """The teacher's final-norm state that predicts each of T tokens, `states * scales`; its head makes logits of it.

    states  [T,D]        bfloat16, or int8; any float on the way in
    scales  float32 [T]  1 for bfloat16. None on the way in: made while it is stored
    mask    bool [T]     whether the teacher said anything about the token
    """

    states: np.ndarray
    scales: np.ndarray | None = None

    empty: ClassVar[Mapping[str, Any]] = {"mask": False, "states": 0, "scales": np.float32(0)}


ROWS: dict[str, type[SignalRow]] = {"topk": TopKRow, "token": TokenRow, "sampled": SampledRow, "hidden": HiddenRow}


def blank(header: SignalHeader, length: int) -> SignalRow:
    """The signal of a row of which the teacher said nothing."""
    kind, wide = ROWS[header.kind], (length, header.k)
    shapes = {"ids": wide, "weights": wide, "logprobs": wide if header.k else (length,), "states": wide}
    values = {name: np.full(shapes.get(name, length), empty) for name, empty in kind.empty.items()}
    if header.kind == "hidden":
        values["states"] = values["states"].astype(np.int8 if header.precision == "int8" else ml_dtypes.bfloat16)
    return kind(**values)


def lay(row: SignalRow, into: Mapping[str, np.ndarray]) -> None:
    """Copy a row into arrays [n, ...] of the same names, its first n tokens; one that keeps fewer outcomes leaves the
    rest empty. Arrays that are the row's own stay."""
    for name, out in into.items():
        values = getattr(row, name)
        if values is out:
            continue
        values = values[:len(out)]
        if values.shape != out.shape:
            out[:, values.shape[1]:] = row.empty[name]
            out = out[:, :values.shape[1]]
        out[...] = values


def truncate_mass(row: TopKRow, mass: float) -> TopKRow:
    """Drop the least probable outcomes of each token beyond the first that reach `mass` (0.99 keeps 99% of what the
    row holds). What is dropped goes into the tail; absent outcomes cost no bytes."""
    order = np.argsort(-row.logprobs, axis=1, kind="stable")
    ids, lp = np.take_along_axis(row.ids, order, axis=1), np.take_along_axis(row.logprobs, order, axis=1)
    p = np.exp(lp)
    upto = np.cumsum(p, axis=1, dtype=np.float64)
    keep = (upto - p < mass * upto[:, -1:]) & (ids >= 0)
    tail = 1.0 - upto[:, -1] if row.tail is None else row.tail
    tail = np.clip(tail + p.sum(axis=1, dtype=np.float64, where=~keep), 0.0, 1.0).astype(np.float32)
    return TopKRow(ids=np.where(keep, ids, -1), logprobs=np.where(keep, lp, np.float32(-np.inf)), mask=row.mask,
                   tail=tail)
