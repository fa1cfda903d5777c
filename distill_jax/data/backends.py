"""The two libraries behind `Tokenizer`: Hugging Face tokenizers and raw sentencepiece models.

Both encode text in which special tokens are written out, add none themselves, and say which bytes each token covers.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers

from distill_jax.data import spans as sp

BLANK = "\u2581"  # sentencepiece's mark of a blank
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Backend(Protocol):
    """What `Tokenizer` needs. `pieces[i]` is the library's name of id i ("" for a hole); `added` are the tokens that
    stand outside the learned vocabulary, by content."""

    pieces: list[str]
    added: dict[str, int]

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]: ...
    def encode_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...
    def save(self, folder: Path) -> None: ...


def byte_alphabet() -> dict[str, int]:
    """The printable characters byte-level BPE writes for the 256 bytes: character -> byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def decode_chunks(ids: Sequence[int], added: Mapping[str, int], decode: Callable[[list[int]], str]) -> str:
    """Decode what stands between added tokens chunk by chunk: inverse of encoding each chunk with its own blank in
    front."""
    contents = {i: s for s, i in added.items()}
    out: list[str] = []
    run: list[int] = []
    for token in ids:
        if (content := contents.get(int(token))) is None:
            run.append(int(token))
            continue
        out += [decode(run), content] if run else [content]
        run = []
    return "".join([*out, decode(run)] if run else out)


class FastBackend:
    """A `tokenizers.Tokenizer` (tokenizer.json): byte-level BPE, or BPE/Unigram over sentencepiece-like pieces."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
        for piece, token in vocabulary.items():
            self.pieces[token] = piece
        self.added = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
        spec = json.loads(backend.to_str())
        self.byte_level = '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])

    @cached_property
    def _bytes(self) -> list[bytes]:
        table, added = byte_alphabet(), set(self.added.values())
        out = []
        for i, piece in enumerate(self.pieces):
            byte = _BYTE.fullmatch(piece)
            if i in added:
                out.append(piece.encode())
            elif self.byte_level and all(c in table for c in piece):
                out.append(bytes(table[c] for c in piece))
            elif byte and not self.byte_level:
                out.append(bytes([int(byte[1], 16)]))
            else:
                out.append(piece.replace(BLANK, " ").encode())
        return out

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(b) for b in self._bytes], np.int64)

    @cached_property
    def _is_byte(self) -> np.ndarray:
        return np.array([not self.byte_level and bool(_BYTE.fullmatch(p)) for p in self.pieces], bool)

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return self._arrays(text, self.backend.encode(text, add_special_tokens=False))

    def encode_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [self._arrays(t, e) for t, e in zip(texts, encoded)]

    def _arrays(self, text: str, encoding: Any) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(encoding.ids, np.int32)
        raw = text.encode("utf-8", "surrogatepass")
        if b"".join(map(self._bytes.__getitem__, encoding.ids)) == raw:
            return ids, sp.from_lengths(self._lengths[ids])
        # the normaliser changed the text: go by the library's character offsets
        where = sp.byte_positions(text)
        offsets = where[np.array(encoding.offsets, np.int64).reshape(-1, 2)]
        return ids, sp.from_starts(sp.token_starts(offsets, self._lengths[ids], self._is_byte[ids]), len(raw))

    @cached_property
    def _chunk_blank(self) -> bool:
        """Whether text behind an added token gets a blank in front (Metaspace with prepend_scheme "always")."""
        if self.byte_level or not self.added:
            return False
        ids = self.backend.encode(f"{next(iter(self.added))}a", add_special_tokens=False).ids
        return len(ids) > 1 and self.token_bytes(ids[1]).startswith(b" ")

    def decode(self, ids: Sequence[int]) -> str:
        whole = lambda run: self.backend.decode(run, skip_special_tokens=False)
        return decode_chunks(ids, self.added, whole) if self._chunk_blank else whole(list(ids))

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self.backend.to_str())


class PieceBackend:
    """A raw sentencepiece model. Control pieces written out in a text (`<s>`, `[INST]`) split it into chunks; each
    chunk is encoded on its own, dummy prefix included, as sentencepiece users do by hand."""

    def __init__(self, proto: bytes) -> None:
        self.proto = proto
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        size = self.model.get_piece_size()
        self.pieces = [self.model.id_to_piece(i) for i in range(size)]
        control = {p: i for i, p in enumerate(self.pieces) if self.model.is_control(i)}
        self.added = control
        longest = sorted(control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest)) + ")") if control else None
        self._is_byte = np.array([self.model.is_byte(i) for i in range(size)], bool)
        self._lengths = np.array([len(self.token_bytes(i)) for i in range(size)], np.int64)

    def token_bytes(self, token: int) -> bytes:
        piece = self.pieces[token]
        byte = _BYTE.fullmatch(piece) if self._is_byte[token] else None
        return bytes([int(byte[1], 16)]) if byte else piece.replace(BLANK, " ").encode()

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        starts: list[np.ndarray] = [np.zeros(0, np.int64)]
        at = 0
        for i, chunk in enumerate(self._split.split(text) if self._split else [text]):
            raw = chunk.encode("utf-8", "surrogatepass")
            if i % 2:
                got, begin = np.array([self.added[chunk]], np.int32), np.zeros(1, np.int64)
            else:
                got, begin = self._chunk(raw)
            ids.append(got)
            starts.append(begin + at)
            at += len(raw)
        return np.concatenate(ids), sp.from_starts(np.concatenate(starts), at)

    def _chunk(self, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
        got = self.model.encode(raw, return_type="offset_mapping")
        ids = np.array(got["ids"], np.int32)
        return ids, sp.token_starts(np.array(got["offsets"], np.int64), self._lengths[ids], self._is_byte[ids])

    def encode_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.encode(t) for t in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return decode_chunks(ids, self.added, self.model.decode)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.proto)
