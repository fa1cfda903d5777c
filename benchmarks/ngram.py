"""An interpolated n-gram model: a teacher with real opinions over a real vocabulary, where there are no weights."""

from collections.abc import Sequence

import numpy as np


class NGram:
    """p(w | h) of order n with Witten-Bell smoothing (Bell, Cleary, Witten 1990):

        p_m(w | h) = (c(h w) + d(h) p_{m-1}(w | h')) / (c(h) + d(h)),    p_0 = 1 / V

    c counts, d distinct followers of a context, h' the context without its first token.
    """

    def __init__(self, rows: Sequence[np.ndarray], order: int, vocab: int) -> None:
        self.order, self.vocab = order, vocab
        self._followers: list[dict[bytes, tuple[np.ndarray, np.ndarray]]] = []
        for m in range(order):
            grams = np.concatenate([np.lib.stride_tricks.sliding_window_view(r, m + 1) for r in rows if len(r) > m])
            distinct, counts = np.unique(np.ascontiguousarray(grams, np.int32), axis=0, return_counts=True)
            edges = np.flatnonzero(np.any(distinct[1:, :m] != distinct[:-1, :m], axis=1)) + 1 if m else np.zeros(0, int)
            self._followers.append({
                distinct[a, :m].tobytes(): (distinct[a:b, m], counts[a:b].astype(np.float64))
                for a, b in zip([0, *edges.tolist()], [*edges.tolist(), len(distinct)])})

    def logprobs(self, history: np.ndarray) -> np.ndarray:
        """float32 [V]: log-probabilities of what follows `history` int32 [T]."""
        p = np.full(self.vocab, 1 / self.vocab)
        for m in range(min(self.order, len(history) + 1)):
            found = self._followers[m].get(np.ascontiguousarray(history[len(history) - m:], np.int32).tobytes())
            if found is None:
                break
            ids, counts = found
            total = counts.sum() + len(ids)
            p *= len(ids) / total
            p[ids] += counts / total
        return np.log(p).astype(np.float32)
