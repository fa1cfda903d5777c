"""Numbering of outcome ids by frequency, so that they compress.

Ids of a tokenizer are in the order its merges were learned. In a signal a few thousand of them make up nearly
everything, so ids are stored as their rank among the outcomes of the signal's first shard: the high byte is then
mostly zero, and what is left of it is skewed. Ids that are not ranked follow behind, shifted by the number of ranks.
"""

from collections.abc import Sequence

import numpy as np

MOST = 1 << 16
"""Ranks kept: two bytes."""
WORTH = 8
"""A numbering costs about two bytes an id; it is kept where every id occurs this often on average."""


class Vocabulary:
    """`ids` int32 [n]: the ranked ids, most frequent first. Empty: ids stand for themselves."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = np.ascontiguousarray(ids, np.int32)
        self._rank = np.full(int(self.ids.max(initial=-1)) + 1, -1, np.int32)
        self._rank[self.ids] = np.arange(len(self.ids), dtype=np.int32)

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Vocabulary":
        """From the outcome ids of a shard's rows; ties go to the smaller id."""
        flat = np.concatenate([*rows, np.zeros(0, np.int32)])
        counts = np.bincount(flat) if len(flat) else np.zeros(0, np.int64)
        order = np.argsort(-counts, kind="stable")[: int(np.count_nonzero(counts))]
        return cls(order[:MOST] if len(order) * WORTH <= len(flat) else np.zeros(0, np.int32))

    def encode(self, ids: np.ndarray) -> np.ndarray:
        """Ids to codes, int32."""
        if not len(self.ids):
            return ids
        known = np.minimum(ids, len(self._rank) - 1)
        rank = np.where(ids < len(self._rank), self._rank[known], np.int32(-1))
        return np.where(rank >= 0, rank, ids + np.int32(len(self.ids)))

    def decode(self, codes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Inverse of `encode`: codes [n] of any integer type to ids int32 [n], in `out` where it is given."""
        n = len(self.ids)
        if n and int(codes.max(initial=0)) < n:
            return np.take(self.ids, codes, out=out, mode="clip")  # the range has been looked at
        ids = codes.astype(np.int32)
        if n:
            ids = np.where(codes < n, self.ids[np.minimum(ids, n - 1)], ids - np.int32(n))
        if out is None:
            return ids
        out[...] = ids
        return out
