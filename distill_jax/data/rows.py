"""Text with pieces and token ids with byte spans, put together: the arrays of a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.core.roles import INJECTED, SUPERVISED, TEMPLATE
from distill_jax.data.conversation import Piece
from distill_jax.data.spans import from_lengths, from_starts
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import Row
from distill_jax.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Text that is encoded by itself, and its pieces (positions from the start of the chunk)."""

    text: str
    pieces: tuple[Piece, ...]

    @property
    def raw(self) -> bytes:
        return self.text.encode("utf-8", "surrogatepass")


def assemble(trace: Trace, chunks: Sequence[Chunk], encoded: Sequence[tuple[np.ndarray, np.ndarray]]) -> Row:
    """The row of chunks one after the other; `encoded[i]` are ids and byte spans of chunk i."""
    ids, spans, pieces, base = [], [], [], 0
    for chunk, (chunk_ids, chunk_spans) in zip(chunks, encoded):
        ids.append(chunk_ids)
        spans.append(chunk_spans + base)
        pieces += _moved(chunk.pieces, base)
        base += len(chunk.raw)
    tokens = np.concatenate(ids).astype(np.int32)
    where = from_starts(np.concatenate(spans)[:, 0], base).astype(np.int64)  # a chunk may have no token at all
    owner = np.searchsorted(np.array([p.start for p in pieces]), where[:, 0], "right") - 1
    parts = np.array([p.part for p in pieces], np.int16)[owner]
    shift = np.array([p.start - p.offset if p.part >= 0 else 0 for p in pieces])[owner]
    steps = np.array([s.step for s in trace.segments] + [0], np.int32)[parts]  # part -1 picks the last: 0
    return Row(trace=trace, text="".join(c.text for c in chunks), tokens=tokens,
               roles=np.array([p.role for p in pieces], np.uint8)[owner], steps=steps, parts=parts,
               spans=(where - shift[:, None]).astype(np.int32))


def from_sampled(trace: Trace, tok: Tokenizer, chunks: Sequence[Chunk]) -> Row:
    """The row of `trace.encoded`: its ids as they were sampled, with roles and spans from the rendered `chunks`.

    Where the text encodes to the sampled ids, this is the row that `render` makes of the text. It need not, and the
    text of the ids need not be the rendered one to the byte: segments are then looked up in it.
    Ids marked as injected get role INJECTED where they would be supervised.
    """
    e = trace.encoded
    assert e is not None
    ids = np.asarray(e.ids, np.int32)
    prompt, written = chunks[:1], chunks[1:]
    if len(chunks) == 1:
        prompt, written = [], list(chunks)
    encoded, fitted = [], []
    added = set(tok.info()["added"].values())
    for part, want in ((ids[:e.prompt_length], prompt), (ids[e.prompt_length:], written)):
        chunk = _joined(want)
        same, spans = tok.encode(chunk.text, continues=bool(encoded))
        if np.array_equal(same, part):
            encoded.append((part, spans))
            fitted.append(chunk)
            continue
        raw = [tok.token_bytes(i) for i in part]
        for t, token in enumerate(raw):  # the blank that sentencepiece puts in front by itself
            if tok.adds_blank and token.startswith(b" ") and (part[t - 1] in added if t else not encoded):
                raw[t] = token[1:]
        encoded.append((part, from_lengths(np.array([len(b) for b in raw], np.int64))))
        fitted.append(_fit(chunk, b"".join(raw)))
    row = assemble(trace, fitted, encoded)
    if e.injected is not None:
        supervised = np.isin(row.roles, [int(r) for r in SUPERVISED])
        row.roles[np.asarray(e.injected, bool) & supervised] = int(INJECTED)
    return row


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    pieces, base = [], 0
    for c in chunks:
        pieces += _moved(c.pieces, base)
        base += len(c.raw)
    return Chunk(text="".join(c.text for c in chunks), pieces=tuple(pieces))


def _moved(pieces: Sequence[Piece], by: int) -> list[Piece]:
    return [Piece(start=p.start + by, role=p.role, part=p.part, offset=p.offset) for p in pieces]


def _fit(chunk: Chunk, raw: bytes) -> Chunk:
    """The chunk with `raw` as its text: segments where they are found in it, one after the other, and between them
    the role the rendered text has there."""
    want = chunk.raw
    if raw == want:
        return chunk
    ends = [p.start for p in chunk.pieces[1:]] + [len(want)]
    out: list[Piece] = []
    cursor, between = 0, None
    for p, end in zip(chunk.pieces, ends):
        at = raw.find(want[p.start:end], cursor) if p.part >= 0 else -1
        if at < 0:
            between = between if between is not None or p.part >= 0 else p.role
            continue
        if at > cursor:
            out.append(Piece(start=cursor, role=p.role if between is None else between))
        out.append(Piece(start=at, role=p.role, part=p.part, offset=p.offset))
        cursor, between = at + end - p.start, None
    if cursor < len(raw):
        last = out[-1].role if out else chunk.pieces[-1].role if chunk.pieces else TEMPLATE
        out.append(Piece(start=cursor, role=last if between is None else between))
    return Chunk(text=raw.decode("utf-8", "replace"), pieces=tuple(out))
