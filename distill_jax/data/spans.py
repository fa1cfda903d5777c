"""Which bytes of a text each token stands for.

A span is `(start, end)` in bytes of the UTF-8 text. The spans of an encoding are a partition: the first starts at 0,
each starts where the one before ended, the last ends at the end. Bytes a normaliser drops (doubled blanks in
many sentencepiece models) belong to the token before them; tokens that stand for nothing (a dummy prefix) have empty
spans.
"""

import numpy as np


def byte_positions(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: byte offset at which each character of `text` starts, and the total at the end."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])


def from_lengths(lengths: np.ndarray) -> np.ndarray:
    """Spans int32 [T,2] of consecutive tokens of the given byte lengths."""
    ends = np.cumsum(lengths)
    return np.stack([ends - lengths, ends], axis=1).astype(np.int32)


def from_starts(starts: np.ndarray, total: int) -> np.ndarray:
    """Spans int32 [T,2]: each token up to the start of the next one, the first from 0, the last up to `total`."""
    out = np.empty((len(starts), 2), np.int32)
    if len(starts):
        out[:, 0], out[:-1, 1] = starts, starts[1:]
        out[0, 0], out[-1, 1] = 0, total
    return out


def token_starts(offsets: np.ndarray, lengths: np.ndarray, is_byte: np.ndarray) -> np.ndarray:
    """Byte at which each token starts [T], from the byte offsets [T,2] a tokenizer library reports.

    Tokens that split a character overlap (Hugging Face) or are empty up to the last one (sentencepiece's bytes).
    lengths [T]: bytes of the token itself; is_byte [T]: tokens that are one raw byte. Inside a run of tokens that
    share characters the starts come from the lengths, if these add up to the run; otherwise they are as reported.
    """
    offsets = offsets.astype(np.int64).reshape(-1, 2)
    starts, ends = np.maximum.accumulate(offsets[:, 0]), np.maximum.accumulate(offsets[:, 1])
    shared = np.zeros(len(starts), bool)  # shared[t]: the boundary between t-1 and t cannot be trusted
    shared[1:] = (starts[1:] < ends[:-1]) | (is_byte[:-1] & (offsets[:-1, 0] == offsets[:-1, 1]))
    for first, last in _runs(shared):
        inner = starts[first] + np.cumsum(lengths[first:last])
        if inner[-1] + lengths[last] == ends[last]:
            starts[first + 1:last + 1] = inner
    return starts


def _runs(shared: np.ndarray) -> list[tuple[int, int]]:
    """`[(first, last)]` of the maximal runs of tokens joined by `shared` boundaries."""
    if not shared.any():
        return []
    edges = np.diff(np.concatenate([shared, [False]]).astype(np.int8))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()))
