"""Teacher signals beside the rows: what a teacher said about each token, under `signals/<name>/`.

A signal has its own header and shards with the row ids and shard boundaries of the store. Every signal row's checksum
is seeded with the content checksum of the row it was made for, so it cannot be read beside a different one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

import distill_jax.traces.store.quantise as quantise
from distill_jax.traces.store.ragged import column
from distill_jax.traces.store.rows import MAX_ID
from distill_jax.traces.store.vocabulary import Vocabulary

KINDS = ("topk", "token")
MAX_K = 4096


@dataclass(frozen=True, kw_only=True)
class SignalHeader:
    """What a signal is and who made it; immutable once written.

    kind       `topk`: the k most probable outcomes; `token`: the log-prob of the token that stands there
    k          outcomes kept at most (topk), 0 for token
    teacher    model, revision and whatever identifies it
    params     how it was scored: template, temperature, dtype, kept mass, ... (JSON)
    precision  of the log-probs, see `quantise`: `u8` (default for topk), `u16` (default for token), `f16`, `f32`
    """

    kind: str
    k: int = 0
    teacher: Mapping[str, Any] | str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    precision: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown signal kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        if not (1 <= self.k <= MAX_K if self.kind == "topk" else self.k == 0):
            raise ValueError(f"a {self.kind} signal cannot have k={self.k}: topk takes 1 to {MAX_K}, token takes 0")
        if not self.precision:
            object.__setattr__(self, "precision", "u8" if self.kind == "topk" else "u16")
        if self.precision not in quantise.PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; expected one of "
                             f"{', '.join(quantise.PRECISIONS)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SignalHeader":
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class TopKRow:
    """The k most probable outcomes at each of T tokens, most probable first.

    ids       int32 [T,K]    token ids, -1 where fewer than K are kept
    logprobs  float32 [T,K]  full-vocabulary log-probs, never renormalised; -inf where ids is -1
    mask      bool [T]       whether the teacher said anything about the token
    tail      float32 [T]    mass outside the kept outcomes, with its own accuracy (1 - sum cancels); 1 where masked.
                             None on the way in: taken as 1 - sum
    """

    ids: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray
    tail: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Log-prob of the token that stands there: logprobs float32 [T] (0 where masked), mask bool [T]."""

    logprobs: np.ndarray
    mask: np.ndarray


SignalRow = TopKRow | TokenRow
Planes = Mapping[str, np.ndarray]
Columns = dict[str, dict[str, np.ndarray]]


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


class TopKCodec:
    """Rows of `TopKRow` as two tables: one entry a token (`tokens`: kept + 1, tail) and one an outcome (`outcomes`:
    id, log-prob code as the difference to the one before). The id column goes through a `Vocabulary`."""

    def __init__(self, header: SignalHeader) -> None:
        self.k = header.k
        self.precision = header.precision
        self._code = quantise.PRECISIONS[header.precision].code
        self._graded = bool(quantise.PRECISIONS[header.precision].steps)
        self.widths = {"tokens": {"kept": 2, "tail": 2 if self._graded else 4},
                       "outcomes": {"id": 4, "code": self._code.itemsize}}

    def encode(self, row: SignalRow, length: int) -> Columns:
        """{table: {column: unsigned integers}}. Raises ValueError for a row that is not a table of log-probabilities
        for `length` tokens."""
        ids, logprobs, mask, tail = self._checked(row, length)
        if np.any(logprobs[:, 1:] > logprobs[:, :-1]):
            order = np.argsort(-logprobs, axis=1, kind="stable")
            ids, logprobs = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
        there = ids >= 0
        kept = np.where(mask, there.sum(axis=1) + 1, 0)
        codes = quantise.encode(logprobs[there], self.precision)
        delta = np.diff(codes, prepend=np.zeros(1, codes.dtype))  # wraps around; the sum does too
        tails = quantise.encode_tail(tail) if self._graded else tail.astype("<f4").view("<u4")
        tails = np.where(mask, tails, np.zeros(1, tails.dtype))
        return {"tokens": {"kept": kept.astype(np.uint16), "tail": tails},
                "outcomes": {"id": ids[there], "code": delta}}

    def _checked(self, row: SignalRow, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """ids int32 and log-probs float32 [T,K] (-1 and -inf where absent), mask [T], tail float64 [T]."""
        if not isinstance(row, TopKRow):
            raise ValueError(f"this signal takes TopKRow, got {type(row).__name__}")
        ids, lp, mask = np.asarray(row.ids), np.asarray(row.logprobs, np.float32), np.asarray(row.mask, bool)
        if ids.ndim != 2 or ids.shape != lp.shape or len(ids) != length or ids.shape[1] > self.k:
            raise ValueError(f"expected ids and logprobs [{length}, at most {self.k}], got {ids.shape} {lp.shape}")
        if mask.shape != (length,):
            raise ValueError(f"expected mask [{length}], got {mask.shape}")
        if ids.max(initial=-1) > MAX_ID:
            raise ValueError(f"token id {ids.max()} does not fit: ids go to {MAX_ID}")
        there = (ids >= 0) & mask[:, None]
        ids = np.where(there, ids, -1).astype(np.int32)
        lp = np.where(there, lp, np.float32(-np.inf))
        if not np.all(np.isfinite(lp) == there) or lp.max(initial=-np.inf) > 1e-3:
            raise ValueError("log-probs of kept outcomes must be finite and at most 0; give outcomes of "
                             "probability 0 the id -1")
        ordered = np.sort(ids, axis=1)
        if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)):
            raise ValueError("an outcome occurs twice at one token")
        total = np.exp(lp).sum(axis=1, dtype=np.float64)
        if np.any(total > 1.001):
            raise ValueError(f"probabilities of one token sum to {total.max():.6f}: these are not log-probabilities "
                             "over the full vocabulary")
        if total.max(initial=0) > 1:  # float noise
            lp = np.nextafter(lp - np.log(np.maximum(total, 1.0))[:, None].astype(np.float32), np.float32(-np.inf))
        lp = np.minimum(lp, np.float32(0))
        rest = np.maximum(1.0 - total, 0.0)
        tail = rest if row.tail is None else np.where(mask, np.asarray(row.tail, np.float64), 1.0)
        if tail.shape != (length,) or not np.all(np.abs(tail - rest)[mask] < 1e-3):
            raise ValueError("tail must be 1 - sum(exp(logprobs)) to 1e-3")
        return ids, lp, mask, tail

    def decode(self, tables: Mapping[str, Planes], length: int, vocabulary: Vocabulary) -> TopKRow:
        """Inverse of `encode`, up to the precision."""
        kept = column(tables["tokens"], "kept", length)
        mask = kept > 0
        count = np.maximum(kept - 1, 0)
        total = int(count.sum())
        flat_ids = vocabulary.decode(column(tables["outcomes"], "id", total))
        delta = column(tables["outcomes"], "code", total, self._code.newbyteorder("="))
        codes = np.cumsum(delta, dtype=delta.dtype)
        lp = quantise.decode(codes, self.precision)
        tails = column(tables["tokens"], "tail", length, np.uint32)
        if self._graded:
            tail = np.where(mask, quantise.decode_tail(tails), np.float32(1))
            lp = self._scaled(lp, codes, count, tail)
        else:
            tail = np.where(mask, tails.view(np.float32), np.float32(1))
        places, shape = _places(count, self.k), (length, self.k)
        return TopKRow(ids=_spread(flat_ids, places, shape, np.int32(-1)),
                       logprobs=_spread(lp, places, shape, np.float32(-np.inf)), mask=mask, tail=tail)

    def _scaled(self, lp: np.ndarray, codes: np.ndarray, count: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """Log-probs moved by one number a token so that the kept mass is 1 - tail."""
        some = np.flatnonzero(count)
        if not len(some):
            return lp
        begins = np.cumsum(count)[some] - count[some]
        mass = np.add.reduceat(quantise.probabilities(codes, self.precision), begins)
        left = np.maximum(1 - tail[some], np.float32(1e-30))
        return np.minimum(lp + np.repeat(np.log(left / mass), count[some]), np.float32(0))


def _places(count: np.ndarray, width: int) -> np.ndarray | None:
    """Where ragged entries, `count` of them a row, stand in a flattened [T, width]; None when they fill it."""
    total = int(count.sum())
    if total == len(count) * width:
        return None
    before = np.cumsum(count) - count
    return np.repeat(np.arange(len(count)) * width - before, count) + np.arange(total)


def _spread(flat: np.ndarray, places: np.ndarray | None, shape: tuple[int, int], empty: Any) -> np.ndarray:
    """Ragged entries into their places of an array that is `empty` elsewhere."""
    if places is None:
        return flat.reshape(shape)
    out = np.full(shape[0] * shape[1], empty)
    out[places] = flat
    return out.reshape(shape)


class TokenCodec:
    """Rows of `TokenRow` as one table: mask, code."""

    def __init__(self, header: SignalHeader) -> None:
        self.precision = header.precision
        self._code = quantise.PRECISIONS[header.precision].code
        self.widths = {"tokens": {"mask": 1, "code": self._code.itemsize}}

    def encode(self, row: SignalRow, length: int) -> Columns:
        if not isinstance(row, TokenRow):
            raise ValueError(f"this signal takes TokenRow, got {type(row).__name__}")
        lp, mask = np.asarray(row.logprobs, np.float32), np.asarray(row.mask, bool)
        if lp.shape != (length,) or mask.shape != (length,):
            raise ValueError(f"expected logprobs and mask [{length}], got {lp.shape} {mask.shape}")
        if np.any(np.isnan(lp[mask])) or np.any(lp[mask] > 1e-3):
            raise ValueError("log-probs must be numbers at most 0")
        lp = np.minimum(np.where(mask, lp, np.float32(0)), np.float32(0))
        codes = quantise.encode(lp, self.precision)
        return {"tokens": {"mask": mask.astype(np.uint8), "code": codes}}

    def decode(self, tables: Mapping[str, Planes], length: int, vocabulary: Vocabulary) -> TokenRow:
        planes = tables["tokens"]
        codes = column(planes, "code", length, self._code.newbyteorder("="))
        return TokenRow(logprobs=quantise.decode(codes, self.precision), mask=column(planes, "mask", length) > 0)


def make_codec(header: SignalHeader) -> TopKCodec | TokenCodec:
    return TopKCodec(header) if header.kind == "topk" else TokenCodec(header)
