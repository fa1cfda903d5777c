"""Which bytes of a text each token stands for.

A span is `(start, end)` in bytes of the UTF-8 text. The spans of an encoding are a partition: the first starts at 0,
each starts where the one before ended, the last ends at the end. Bytes a normaliser drops (leading blanks of some
sentencepiece models) belong to the token after them; tokens that stand for nothing (a dummy prefix) have empty spans.
"""

from collections.abc import Sequence

import numpy as np


def byte_positions(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: byte offset at which each character of `text` starts, and the total at the end."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])


def from_lengths(lengths: np.ndarray, start: int = 0) -> np.ndarray:
    """Spans int32 [T,2] of consecutive tokens of the given byte lengths."""
    ends = start + np.cumsum(lengths)
    return np.stack([ends - lengths, ends], axis=1).astype(np.int32)


def partition(offsets: np.ndarray, total: int, lengths: np.ndarray, is_byte: np.ndarray) -> np.ndarray:
    """Turn the byte offsets a tokenizer library reports into a partition of `total` bytes.

    offsets [T,2] as reported: tokens that split a character overlap (Hugging Face) or are empty up to the last one
    (sentencepiece byte fallback). lengths [T]: bytes of the token itself; is_byte [T]: tokens that are one raw byte.
    Inside a run of tokens that share characters the boundaries come from the lengths, if these add up to the run;
    otherwise from where the library says each token ends.
    """
    count = len(offsets)
    if count == 0:
        return np.zeros((0, 2), np.int32)
    starts, ends = offsets[:, 0].astype(np.int64), np.maximum.accumulate(offsets[:, 1].astype(np.int64))
    shared = np.zeros(count, bool)  # shared[t]: the boundary between t-1 and t cannot be trusted
    shared[1:] = (starts[1:] < ends[:-1]) | (is_byte[:-1] & (offsets[:-1, 0] == offsets[:-1, 1]))
    for first, last in _runs(shared):
        low = ends[first - 1] if first else 0
        low = max(low, starts[first])
        inner = low + np.cumsum(lengths[first:last])
        if inner[-1] + lengths[last] == ends[last]:
            ends[first:last] = inner
    ends[-1] = total
    return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1).astype(np.int32)


def _runs(shared: np.ndarray) -> list[tuple[int, int]]:
    """`[(first, last)]` of the maximal runs of tokens joined by `shared` boundaries."""
    if not shared.any():
        return []
    edges = np.diff(np.concatenate([shared, [False]]).astype(np.int8))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()))


def locate(needles: Sequence[bytes], text: bytes) -> list[int]:
    """Byte positions of `needles` found one after the other in `text`; -1 for one that is not there."""
    out, cursor = [], 0
    for needle in needles:
        at = text.find(needle, cursor) if needle else -1
        out.append(at)
        cursor = at + len(needle) if at >= 0 else cursor
    return out
