"""LASER: a length reward that is a step function (2505.15612), with targets that follow the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.rewards.outcome import outcome
from distill_jax.rewards.repetition import loops
from distill_jax.rewards.sample import Sample, groups_of

EASY, MEDIUM, HARD = range(3)


def laser(sample: Sample, target: float, bonus: float = 0.5, wrong: float = -0.5, unanswered: float = -1.0) -> float:
    """Correctness, plus a bonus for a right answer within the target length.

        R = C + bonus 1[right and L <= target]    C = 1 right, -0.5 wrong, -1 without an answer     LASER (eq. 4; code)
    """
    base = outcome(sample, 1.0, wrong, unanswered)
    return base + (bonus if sample.correct and sample.tokens <= target else 0.0)


def band(pass_rate: float) -> int:
    """Difficulty of a prompt: easy from 2/3, medium from 1/3, else hard (one rule for monitor and reward; the paper's
    code differs by what happens on the boundary)."""
    near = 1e-9  # 2/3 as a float against a count of 2 in 3
    return EASY if pass_rate >= 2 / 3 - near else MEDIUM if pass_rate >= 1 / 3 - near else HARD


def wanted(rollouts: int) -> tuple[int, int, int]:
    """Of K rollouts, k for each band: a target covers a share of at least 1/k of its responses, so that one right
    answer is expected within it. int(2K/3), int(K/3), 1 (code), at least 1."""
    return max(1, 2 * rollouts // 3), max(1, rollouts // 3), 1


@dataclass(frozen=True, kw_only=True)
class LaserD:
    """LASER with a target for each difficulty, found on a monitoring set; LASER-DE with `explore`.

        LASER-D    R = C + bonus 1[right and L <= target of the prompt's band]
        LASER-DE   and explore 1[wrong but answered, L > target, no loop]
        target     smallest l of the grid with k coverage(l) >= 1, coverage: share of all monitored responses of the
                   band with L <= l; where there is none, or no prompt of the band, no limit (the longest of the batch)

    State: {"targets": float64 [easy, medium, hard]}, infinite where there is no limit. `update` takes the monitoring
    set: in the paper 500 prompts, 8 rollouts each, every 20 updates. A prompt's band in training is that of its own
    group. bonus 0.5, grid from 4096 by 1024 to 16384: the paper's, for a context of 16K. `start` is every band's target
    before the first monitoring set (the code: LASER's fixed one). What counts as a loop is ours (`repetition.loops`):
    the code takes a 4-gram said three times for one, which nearly every long text has.
    """

    lower: int = 4096
    upper: int = 16384
    step: int = 1024
    start: float = np.inf
    bonus: float = 0.5
    explore: float = 0.0
    wrong: float = -0.5
    unanswered: float = -1.0

    def __post_init__(self) -> None:
        if not (0 < self.lower <= self.upper and self.step > 0):
            raise ValueError(f"LaserD needs 0 < lower <= upper and a positive step, got {self}")

    def init(self) -> dict[str, np.ndarray]:
        return {"targets": np.full(3, self.start, np.float64)}

    def value(self, samples: Sequence[Sample], state: dict[str, np.ndarray]) -> list[float]:
        out = [0.0] * len(samples)
        for index in groups_of(samples):
            target = float(state["targets"][band(_pass_rate([samples[i] for i in index]))])
            for i in index:
                out[i] = self._one(samples[i], target)
        return out

    def _one(self, sample: Sample, target: float) -> float:
        reward = laser(sample, target, self.bonus, self.wrong, self.unanswered)
        explored = not sample.correct and sample.answered and sample.tokens > target
        return reward + (self.explore if self.explore and explored and not loops(sample) else 0.0)

    def update(self, samples: Sequence[Sample], state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        groups = [[samples[i] for i in index] for index in groups_of(samples)]
        if not groups:
            return state
        rollouts = max(len(g) for g in groups)
        lengths: list[list[int]] = [[], [], []]
        for g in groups:
            lengths[band(_pass_rate(g))] += [s.tokens for s in g]
        return {"targets": np.array([self.target(n, k) for n, k in zip(lengths, wanted(rollouts))])}

    def target(self, lengths: Sequence[int], k: int) -> float:
        """Smallest length of the grid that covers a share of 1/k of `lengths`, infinite where none does."""
        for limit in range(self.lower, self.upper + 1, self.step):
            if lengths and k * sum(n <= limit for n in lengths) >= len(lengths):
                return float(limit)
        return np.inf


def _pass_rate(samples: Sequence[Sample]) -> float:
    return sum(s.correct for s in samples) / len(samples)
