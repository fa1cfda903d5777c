"""Signal rows as tables of unsigned integers, and back: one codec for each kind of signal."""

from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

import distill_jax.traces.store.quantise as quantise
from distill_jax.traces.store.ragged import column, narrow
from distill_jax.traces.store.rows import MAX_ID
from distill_jax.traces.store.signals import (
    COUNTS,
    STATES,
    HiddenRow,
    SampledRow,
    SignalHeader,
    SignalRow,
    TokenRow,
    TopKRow,
)
from distill_jax.traces.store.vocabulary import Vocabulary

Planes = Mapping[str, np.ndarray]
Columns = dict[str, dict[str, np.ndarray]]


class Codec(Protocol):
    """What a signal of one kind looks like in a shard.

    widths  {table: {column: bytes}}; the column `id` holds token ids and goes through a `Vocabulary`
    """

    @property
    def widths(self) -> Mapping[str, Mapping[str, int]]: ...

    def encode(self, row: SignalRow, length: int) -> Columns:
        """{table: {column: unsigned integers}}. Raises ValueError for a row that does not fit `length` tokens, or
        whose values cannot be (NaN, probabilities that sum to more than 1, ...)."""
        ...

    def decode(self, tables: Mapping[str, Planes], length: int, vocabulary: Vocabulary,
               into: Mapping[str, np.ndarray] | None = None) -> SignalRow:
        """Inverse of `encode`, up to the precision. Arrays of `into` may become arrays of the row: what is there is
        written over then, and no copy is made."""
        ...


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
        ids, lp, mask = _outcomes(row.ids, row.logprobs, row.mask, length, self.k)
        there = ids >= 0
        lp = np.where(there, lp, np.float32(-np.inf))
        if not np.all(np.isfinite(lp) == there) or lp.max(initial=-np.inf) > 1e-3:
            raise ValueError("log-probs of kept outcomes must be finite and at most 0; give outcomes of "
                             "probability 0 the id -1")
        if _repeated(ids):
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

    def decode(self, tables: Mapping[str, Planes], length: int, vocabulary: Vocabulary,
               into: Mapping[str, np.ndarray] | None = None) -> TopKRow:
        kept = column(tables["tokens"], "kept", length)
        mask = kept > 0
        count = np.maximum(kept - 1, 0)
        total = int(count.sum())
        place = into or {}
        there = {name: x.reshape(-1) for name, x in place.items() if x.shape == (length, self.k) and x.size == total
                 and x.flags.c_contiguous}  # nothing is absent: flat is whole
        flat_ids = vocabulary.decode(narrow(tables["outcomes"], "id", total), there.get("ids"))
        delta = column(tables["outcomes"], "code", total, self._code.newbyteorder("="))
        codes = quantise.running_sum(delta)
        lp = quantise.decode(codes, self.precision, there.get("logprobs"))
        tails = column(tables["tokens"], "tail", length, np.uint32)
        if self._graded:
            tail = np.where(mask, quantise.decode_tail(tails), np.float32(1))
            lp = self._scaled(lp, codes, count, tail)
        else:
            tail = np.where(mask, tails.view(np.float32), np.float32(1))
        rows = {"ids": _spread(flat_ids, count, self.k, np.int32(-1)),
                "logprobs": _spread(lp, count, self.k, np.float32(-np.inf))}
        return TopKRow(**{n: place[n] if n in there else x for n, x in rows.items()}, mask=mask, tail=tail)

    def _scaled(self, lp: np.ndarray, codes: np.ndarray, count: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """Log-probs moved by one number a token so that the kept mass is 1 - tail."""
        some = np.flatnonzero(count)
        if not len(some):
            return lp
        begins = np.cumsum(count)[some] - count[some]
        mass = np.add.reduceat(quantise.probabilities(codes, self.precision), begins)
        left = np.maximum(1 - tail[some], np.float32(1e-30))
        move = np.log(left / mass)
        if len(lp) == len(some) * self.k:
            lp.reshape(-1, self.k)[...] += move[:, None]
        else:
            lp += np.repeat(move, count[some])
        return np.minimum(lp, np.float32(0), out=lp)


def _spread(flat: np.ndarray, count: np.ndarray, width: int, empty: Any) -> np.ndarray:
    """Ragged entries, `count` [T] of them a row, as an array [T,width] that is `empty` behind them."""
    if len(flat) == len(count) * width:
        return flat.reshape(-1, width)
    out = np.full((len(count), width), empty)
    out[np.arange(width) < count[:, None]] = flat
    return out


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

    def decode(self, tables: Mapping[str, Planes], length: int, vocabulary: Vocabulary,
               into: Mapping[str, np.ndarray] | None = None) -> TokenRow:
        planes = tables["tokens"]
        codes = column(planes, "code", length, self._code.newbyteorder("="))
        return TokenRow(logprobs=quantise.decode(codes, self.precision), mask=column(planes, "mask", length) > 0)


class SampledCodec:
    """Rows of `SampledRow`: one entry a token (`tokens`: kept + 1) and one an outcome (`outcomes`: id, and how often
    it was drawn, or the code of its log weight). Decoded weights sum to 1."""

    def __init__(self, header: SignalHeader) -> None:
        self.n, self.precision = header.k, header.precision
        self._width = (2 if self.n > 255 else 1) if self.precision == COUNTS else (
            quantise.PRECISIONS[self.precision].width)
        self.widths = {"tokens": {"kept": 2}, "outcomes": {"id": 4, "code": self._width}}

    def encode(self, row: SignalRow, length: int) -> Columns:
        if not isinstance(row, SampledRow):
            raise ValueError(f"this signal takes SampledRow, got {type(row).__name__}")
        ids, weights, mask = _outcomes(row.ids, row.weights, row.mask, length, self.n)
        there = ids >= 0
        weights = np.where(there, weights, np.float32(0))
        total = weights.sum(axis=1, dtype=np.float64)
        if not np.all(np.isfinite(total)) or np.any(weights < 0) or np.any(np.abs(total - 1)[mask] > 1e-3):
            raise ValueError("weights must be finite, not negative, and sum to 1 at each token")
        if _repeated(ids):
            raise ValueError("an outcome occurs twice at one token: add its weights up")
        codes = self._counts(weights) if self.precision == COUNTS else quantise.encode(
            np.log(np.clip(weights, 1e-30, 1)), self.precision)
        order = np.argsort(-weights, axis=1, kind="stable")
        ids, codes, there = (np.take_along_axis(x, order, axis=1) for x in (ids, codes, there))
        kept = np.where(mask, there.sum(axis=1) + 1, 0).astype(np.uint16)
        return {"tokens": {"kept": kept}, "outcomes": {"id": ids[there], "code": codes[there]}}

    def _counts(self, weights: np.ndarray) -> np.ndarray:
        counts = np.rint(weights * self.n)
        if np.abs(counts - weights * self.n).max(initial=0) > 1e-2:
            raise ValueError(f"weights are not numbers of {self.n} equal draws: choose another precision than "
                             f"{COUNTS!r} for weights with importance")
        return counts.astype(np.uint16)

    def decode(self, tables: Mapping[str, Planes], length: int, vocabulary: Vocabulary,
               into: Mapping[str, np.ndarray] | None = None) -> SampledRow:
        kept = column(tables["tokens"], "kept", length)
        count = np.maximum(kept - 1, 0)
        total = int(count.sum())
        ids = vocabulary.decode(narrow(tables["outcomes"], "id", total))
        codes = column(tables["outcomes"], "code", total, np.dtype(f"u{self._width}"))
        weights = codes.astype(np.float32) if self.precision == COUNTS else np.exp(
            quantise.decode(codes, self.precision))
        weights = _spread(weights, count, self.n, np.float32(0))
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.float32(1e-30))
        return SampledRow(ids=_spread(ids, count, self.n, np.int32(-1)), weights=weights, mask=kept > 0)


class HiddenCodec:
    """Rows of `HiddenRow`: one entry a token (`tokens`: mask, scale) and one a number of the tokens that have a state
    (`states`: bfloat16 bits, or int8 plus 128). The high bytes of bfloat16, sign and exponent, compress."""

    def __init__(self, header: SignalHeader) -> None:
        self.width, self.int8 = header.k, header.precision == "int8"
        self.widths = {"tokens": {"mask": 1, **({"scale": 4} if self.int8 else {})},
                       "states": {"state": STATES[header.precision]}}

    def encode(self, row: SignalRow, length: int) -> Columns:
        if not isinstance(row, HiddenRow):
            raise ValueError(f"this signal takes HiddenRow, got {type(row).__name__}")
        states, mask = np.asarray(row.states), np.asarray(row.mask, bool)
        if states.shape != (length, self.width) or mask.shape != (length,):
            raise ValueError(f"expected states [{length}, {self.width}] and mask [{length}], got {states.shape} "
                             f"{mask.shape}")
        kept = states[mask].astype(np.float32)
        if row.scales is not None:
            kept *= np.asarray(row.scales, np.float32)[mask][:, None]
        if not np.all(np.isfinite(kept)):
            t = np.flatnonzero(mask)[np.flatnonzero(~np.isfinite(kept).all(axis=1))[0]]
            raise ValueError(f"the state at token {t} is not finite")
        tokens = {"mask": mask.astype(np.uint8)}
        if not self.int8:
            return {"tokens": tokens, "states": {"state": kept.astype(ml_dtypes.bfloat16).view(np.uint16).reshape(-1)}}
        scale = np.abs(kept).max(axis=1, initial=0) / np.float32(127)
        scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
        codes = (np.clip(np.rint(kept / scale[:, None]), -127, 127) + 128).astype(np.uint8)
        scales = np.zeros(length, np.float32)
        scales[mask] = scale
        return {"tokens": {**tokens, "scale": scales.view(np.uint32)}, "states": {"state": codes.reshape(-1)}}

    def decode(self, tables: Mapping[str, Planes], length: int, vocabulary: Vocabulary,
               into: Mapping[str, np.ndarray] | None = None) -> HiddenRow:
        mask = column(tables["tokens"], "mask", length) > 0
        count = int(mask.sum()) * self.width
        if self.int8:
            flat = (column(tables["states"], "state", count, np.uint8) ^ np.uint8(128)).view(np.int8)
            scales = column(tables["tokens"], "scale", length, np.uint32).view(np.float32)
        else:
            flat = column(tables["states"], "state", count, np.uint16).view(ml_dtypes.bfloat16)
            scales = mask.astype(np.float32)
        states = np.zeros((length, self.width), flat.dtype)
        states[mask] = flat.reshape(-1, self.width)
        return HiddenRow(states=states, scales=scales, mask=mask)


def _outcomes(ids: Any, values: Any, mask: Any, length: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids int32 [T,K], -1 where there is none or no mask; values float32 [T,K]; mask bool [T]) of a row to be written.

    Raises ValueError for other shapes, and ids that the store cannot hold.
    """
    ids, values, mask = np.asarray(ids), np.asarray(values, np.float32), np.asarray(mask, bool)
    if ids.ndim != 2 or ids.shape != values.shape or len(ids) != length or ids.shape[1] > width:
        raise ValueError(f"expected ids and their values [{length}, at most {width}], got {ids.shape} {values.shape}")
    if mask.shape != (length,):
        raise ValueError(f"expected mask [{length}], got {mask.shape}")
    if ids.max(initial=-1) > MAX_ID:
        raise ValueError(f"token id {ids.max()} does not fit: ids go to {MAX_ID}")
    return np.where((ids >= 0) & mask[:, None], ids, -1).astype(np.int32), values, mask


def _repeated(ids: np.ndarray) -> bool:
    """Whether an id other than -1 occurs twice in a row of [T,K]."""
    ordered = np.sort(ids, axis=1)
    return bool(np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)))


def make_codec(header: SignalHeader) -> Codec:
    return {"topk": TopKCodec, "token": TokenCodec, "sampled": SampledCodec, "hidden": HiddenCodec}[header.kind](header)
