"""The shares of a `Mix` while they are steered (DDK), as a small state that lives in the train state.

State of N sources: shares f32 [N]; taken i32 [N], sequences of each source read before update `since` (i32); rounds
i32, how often the shares were changed. `BatchSource.mixed(state)` reads by it, so that a batch stays a pure function of
(seed, step, state), and a checkpoint holds all of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
State = dict[str, Any]


def initial(weights: Sequence[float]) -> State:
    """Before anything was measured: the weights of the `Mix`."""
    share = np.asarray(weights, np.float64)
    return {"shares": (share / share.sum()).astype(np.float32), "taken": np.zeros(len(share), np.int32),
            "since": np.int32(0), "rounds": np.int32(0)}


def first_shares(gaps: Array) -> Array:
    """softmax(g) [N]; g_i = student's perplexity / teacher's on the held-out rows of source i. DDK (2407.16154)."""
    e = np.exp(gaps - np.max(gaps))
    return e / e.sum()


def next_shares(shares: Array, gaps: Array, alpha: float) -> Array:
    """psi_i = r_i exp(g_i);  r_i <- alpha psi_i / sum(psi) + (1 - alpha) / N. DDK (2407.16154), factor smoothing.

    The largest gap is subtracted first: the quotient is the same, and nothing overflows.
    """
    psi = np.asarray(shares, np.float64) * np.exp(gaps - np.max(gaps))
    return alpha * psi / psi.sum() + (1 - alpha) / len(psi)


def steered(state: Mapping[str, Any], gaps: Array, alpha: float, step: int, taken: Sequence[int]) -> State:
    """The state that holds from update `step` on. gaps [N]: as above; taken: sequences read of each source by then.

    Raises ValueError, naming the source, for a gap that is not finite.
    """
    gaps = np.asarray(gaps, np.float64)
    if not np.isfinite(gaps).all():
        raise ValueError(f"the perplexity ratio of source {int(np.argmin(np.isfinite(gaps)))} of the mix is not finite "
                         f"at update {step}: {gaps.tolist()}; look at its held-out rows and their teacher signal")
    shares = next_shares(np.asarray(state["shares"]), gaps, alpha) if int(state["rounds"]) else first_shares(gaps)
    return {"shares": shares.astype(np.float32), "taken": np.asarray(taken, np.int32), "since": np.int32(step),
            "rounds": np.int32(int(state["rounds"]) + 1)}
