"""A row of the store: one rendered trace, its tokens, and what each token is."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_jax.core.roles import NUM_ROLES
from distill_jax.traces.store.ragged import column, plane_names, to_planes
from distill_jax.traces.store.sealed import canonical
from distill_jax.traces.trace import Encoded, Trace

TOKEN_WIDTHS = {"token": 3, "role": 1, "step": 4, "part": 2, "gap": 4, "length": 4}
TOKEN_PLANES = plane_names(TOKEN_WIDTHS)
MAX_ID = (1 << 24) - 1
"""Largest token id: three bytes."""


@dataclass(frozen=True, kw_only=True)
class RowArrays:
    """The per-token arrays of a row of T tokens.

    tokens int32 [T]   token ids
    roles  uint8 [T]   `core.roles.Role`
    steps  int32 [T]   reasoning step from 1, 0 = none
    parts  int16 [T]   index into `trace.segments` of the segment the token came from, -1 = template
    spans  int32 [T,2] byte offsets of the token within that segment's text (within the row's `text` for template
                       tokens)
    """

    tokens: np.ndarray
    roles: np.ndarray
    steps: np.ndarray
    parts: np.ndarray
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Row(RowArrays):
    """A row with its trace and the whole rendered `text`."""

    trace: Trace
    text: str


@dataclass(frozen=True, kw_only=True)
class RowIndex:
    """Cheap columns of all N rows, read with the commits when the store is opened.

    lengths   int32 [N]  tokens
    groups    N strings  `trace.group`: rows of one question share it
    verdicts  int8 [N]   1 right, 0 wrong, -1 not checked
    flags     N tuples   `trace.flags`, sorted
    digests   uint64 [N] content of the row's arrays: equal for equal rows
    """

    lengths: np.ndarray
    groups: tuple[str, ...]
    verdicts: np.ndarray
    flags: tuple[tuple[str, ...], ...]
    digests: np.ndarray


_FIELDS = (("tokens", "<i4", 0, MAX_ID), ("roles", "u1", 0, NUM_ROLES - 1), ("steps", "<i4", 0, 2**31 - 1),
           ("parts", "<i2", -1, 2**15 - 1), ("spans", "<i4", 0, 2**31 - 1))


def checked(row: RowArrays) -> RowArrays:
    """The arrays in their stored types. Raises ValueError for a row that cannot be stored."""
    n = len(row.tokens)
    if n == 0:
        raise ValueError("a row needs at least one token")
    out: dict[str, np.ndarray] = {}
    for name, dtype, low, high in _FIELDS:
        value = np.asarray(getattr(row, name))
        shape = (n, 2) if name == "spans" else (n,)
        if value.shape != shape or value.dtype.kind not in "iu":
            raise ValueError(f"row.{name}: expected integers of shape {shape}, got {value.dtype} {value.shape}")
        if int(value.min()) < low or int(value.max()) > high:
            raise ValueError(f"row.{name}: values run from {value.min()} to {value.max()}, outside {low}..{high}")
        out[name] = np.ascontiguousarray(value, dtype)
    if np.any(out["spans"][:, 1] < out["spans"][:, 0]):
        raise ValueError("row.spans: a span ends before it starts")
    return RowArrays(**out)


def digest(row: RowArrays) -> str:
    """Content checksum of a row's arrays (64 bits, hex): the same wherever and however the row is stored."""
    h = hashlib.blake2b(digest_size=8)
    for name, dtype, _, _ in _FIELDS:
        h.update(np.ascontiguousarray(getattr(row, name), dtype).data)
    return h.hexdigest()


def encode_tokens(row: RowArrays) -> np.ndarray:
    """Byte planes uint8 [P,T] in the order of `TOKEN_PLANES`.

    Spans are kept as their length and their gap to the token before in the same part, which is nearly always 0.
    """
    order, begins = _by_part(row.parts)
    starts, ends = row.spans[order, 0].astype(np.int64), row.spans[order, 1].astype(np.int64)
    before = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    before[begins] = 0
    gap = np.empty(len(row), np.int64)
    gap[order] = starts - before
    columns = {"token": row.tokens, "role": row.roles, "step": row.steps, "part": row.parts.astype(np.int32) + 1,
               "gap": _zigzag(gap), "length": row.spans[:, 1] - row.spans[:, 0]}
    return to_planes({name: (columns[name], width) for name, width in TOKEN_WIDTHS.items()})


def decode_tokens(planes: Mapping[str, np.ndarray], n: int, places: bool = True) -> RowArrays:
    """Inverse of `encode_tokens`. places=False leaves parts and spans empty: half of the work, not part of a batch."""
    tokens, roles = column(planes, "token", n), column(planes, "role", n, np.uint8)
    parts, spans = _places(planes, n) if places else (np.zeros(0, np.int16), np.zeros((0, 2), np.int32))
    return RowArrays(tokens=tokens, roles=roles, steps=column(planes, "step", n), parts=parts, spans=spans)


def _places(planes: Mapping[str, np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(parts [n], spans [n,2])."""
    parts = (column(planes, "part", n) - 1).astype(np.int16)
    length = column(planes, "length", n)
    gap = column(planes, "gap", n, np.uint32)
    order, begins = _by_part(parts)
    move = (_unzigzag(gap) + length)[order]
    ends = np.cumsum(move)
    base = (ends - move)[begins]
    ends -= np.repeat(base, np.diff(np.append(begins, n)))
    spans = np.empty((n, 2), np.int32)
    spans[order, 1] = ends
    spans[:, 0] = spans[:, 1] - length
    return parts, spans


def _by_part(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token order grouped by part (stable), and where each group begins in that order."""
    order = np.argsort(parts, kind="stable")
    ordered = parts[order]
    return order, np.flatnonzero(np.concatenate([np.ones(1, bool), ordered[1:] != ordered[:-1]]))


def _zigzag(x: np.ndarray) -> np.ndarray:
    return ((x << 1) ^ (x >> 63)).astype(np.uint32)


def _unzigzag(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.int64)
    return (wide >> 1) ^ -(wide & 1)


def encode_document(text: str, trace: Trace) -> bytes:
    """Text and trace as JSON. Arrays of sampled ids and log-probs are base64: exact, and shorter than decimals."""
    value = trace.to_json()
    if trace.encoded is not None:
        e = trace.encoded
        value["encoded"] = {
            "tokenizer": e.tokenizer, "prompt_length": e.prompt_length, "ids": _base64(e.ids, "<i4"),
            "logprobs": _base64(e.logprobs, "<f4"), "injected": _base64(e.injected, "u1")}
    return canonical({"text": text, "trace": value}, "a trace (meta, scores, sampling)").encode(
        "utf-8", "surrogatepass")


def decode_document(data: bytes) -> tuple[str, Trace]:
    """Inverse of `encode_document`."""
    value = json.loads(data.decode("utf-8", "surrogatepass"))
    e = value["trace"].pop("encoded", None)
    trace = Trace.from_json(value["trace"])
    if e is not None:
        logprobs, injected = _array(e["logprobs"], "<f4"), _array(e["injected"], "u1")
        trace = trace.replace(encoded=Encoded(
            tokenizer=e["tokenizer"], prompt_length=e["prompt_length"], ids=_array(e["ids"], "<i4"),
            logprobs=logprobs, injected=None if injected is None else injected.astype(bool)))
    return value["text"], trace


def _base64(x: Any, dtype: str) -> str | None:
    return None if x is None else base64.b64encode(np.ascontiguousarray(x, dtype).tobytes()).decode()


def _array(x: str | None, dtype: str) -> Any:
    return None if x is None else np.frombuffer(base64.b64decode(x), dtype).copy()
