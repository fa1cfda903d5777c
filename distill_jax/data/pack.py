"""Which rows go into which training sequence: a plan, computed from row lengths alone.

Rows are shuffled once by the seed and packed window by window (best fit, longest first), so the plan is a pure
function of (lengths, seq_len, seed, window): no process needs to know another's. Each epoch visits the same sequences
in another order; epochs follow each other without a gap, so `plan.at(position)` is defined for every position.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

OverLong = Literal["drop", "cut"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sequences of rows. Sequence s holds `rows[offsets[s]:offsets[s + 1]]`.

    rows int64 [M] row numbers; offsets int64 [S+1]; dropped and cut count over-long rows; tokens is what one epoch
    holds (after cutting).
    """

    rows: np.ndarray
    offsets: np.ndarray
    seq_len: int
    seed: int
    tokens: int
    dropped: int = 0
    cut: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def nothing(cls, seq_len: int) -> "Plan":
        """The plan over no rows."""
        return cls(rows=np.zeros(0, np.int64), offsets=np.zeros(1, np.int64), seq_len=seq_len, seed=0, tokens=0)

    @property
    def places(self) -> np.ndarray:
        """int64 [M]: number of each of `rows` within its sequence, from 1."""
        return np.arange(len(self.rows)) - np.repeat(self.offsets[:-1], np.diff(self.offsets)) + 1

    def of_members(self, starts: np.ndarray) -> "Plan":
        """The plan of the members where this one is of units: unit u is rows starts[u] to starts[u + 1] - 1."""
        sizes = np.diff(starts)[self.rows]
        ends = np.cumsum(sizes)
        rows = np.repeat(starts[self.rows] - (ends - sizes), sizes) + np.arange(sizes.sum())
        return replace(self, rows=rows, offsets=np.concatenate([[0], ends])[self.offsets], _orders={})

    @property
    def sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def fill(self) -> float:
        """Share of the sequences' positions that hold a token."""
        return self.tokens / (self.sequences * self.seq_len)

    def order(self, epoch: int) -> np.ndarray:
        """Permutation of the sequences in an epoch."""
        known = self._orders.get(epoch)
        if known is None:  # threads that read ahead may both make it: it is the same
            known = np.random.default_rng([self.seed, 1, epoch]).permutation(self.sequences)
            self._orders[epoch] = known
            for old in [e for e in list(self._orders) if abs(e - epoch) > 2]:
                self._orders.pop(old, None)
        return known

    def at(self, position: int) -> np.ndarray:
        """Row numbers of the sequence at `position` of the endless stream of epochs."""
        epoch, index = divmod(position, self.sequences)
        s = self.order(epoch)[index]
        return self.rows[self.offsets[s]:self.offsets[s + 1]]


def plan(lengths: np.ndarray, *, seq_len: int, seed: int, rows: np.ndarray | None = None, pack: bool = True,
         window: int = 8192, over_long: OverLong = "drop", room: np.ndarray | None = None) -> Plan:
    """Plan over the rows with these lengths [N]; `rows` [N] are their numbers (default 0..N-1).

    room [N]: what a row takes of a sequence where that is more than its own tokens (a further view fills up first).

    pack=False puts one row in each sequence. Rows longer than seq_len are left out ("drop") or counted as seq_len
    ("cut": the reader keeps their first seq_len tokens, which cuts the answer off). Raises ValueError when no row is
    left.
    """
    lengths = np.asarray(lengths, np.int64)
    ids = np.arange(len(lengths)) if rows is None else np.asarray(rows, np.int64)
    needed = lengths if room is None else np.maximum(lengths, np.asarray(room, np.int64))
    long = needed > seq_len
    keep = (lengths > 0) & (~long if over_long == "drop" else True)
    if not keep.any():
        longest = f"; the shortest row has {needed.min()} tokens, seq_len is {seq_len}" if len(lengths) else ""
        raise ValueError(f"no row to train on: {len(lengths)} rows{longest}. Raise seq_len or relax the filters.")
    ids, size = ids[keep], np.minimum(needed[keep], seq_len)
    shuffled = np.random.default_rng([seed, 0]).permutation(len(ids))
    ids, size = ids[shuffled], size[shuffled]
    if pack:
        order, offsets = _best_fit(size, seq_len, window)
    else:
        order, offsets = np.arange(len(ids)), np.arange(len(ids) + 1)
    count, tokens = int(long.sum()), int(np.minimum(lengths[keep], seq_len).sum())
    return Plan(rows=ids[order], offsets=offsets, seq_len=seq_len, seed=seed, tokens=tokens,
                dropped=count if over_long == "drop" else 0, cut=count if over_long == "cut" else 0)


def _best_fit(size: np.ndarray, capacity: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """(order [N], offsets [S+1]) of best-fit-decreasing bins, window by window."""
    bin_of = np.empty(len(size), np.int64)
    made = 0
    for start in range(0, len(size), window):
        part = size[start:start + window]
        longest_first = np.argsort(-part, kind="stable")
        owner, bins = _fill_window(part[longest_first].tolist(), capacity)
        bin_of[start + longest_first] = np.array(owner, np.int64) + made
        made += bins
    order = np.argsort(bin_of, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=made))])


def _fill_window(sizes: list[int], capacity: int) -> tuple[list[int], int]:
    """Bin of each item: the fullest bin it still fits in. `free` is sorted by (room, bin), held as one integer."""
    free: list[int] = []
    owner: list[int] = []
    shift = len(sizes).bit_length()
    low, bins = (1 << shift) - 1, 0
    for size in sizes:
        at = bisect_left(free, size << shift)
        if at < len(free):
            entry = free.pop(at)
            room, which = (entry >> shift) - size, entry & low
        else:
            room, which = capacity - size, bins
            bins += 1
        owner.append(which)
        if room:
            insort(free, room << shift | which)
    return owner, bins
