"""Which answers to one question are compared: builders of preference pairs and of single judged answers.

A builder is given what is known of all answers to a question and names units of them, each a chosen and a rejected
answer, or one of the two alone (KTO). It is a pure function of the answers and the generator; `build_units` gives every
question a generator of its own, so that further questions in the store change no pair of the others.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

RIGHT, WRONG = 1, 0
"""Verdicts, as in `RowIndex.verdicts`; -1 was not checked and is neither."""
NOBODY = -1
"""In place of an answer that a unit does not have."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The N answers to one question, in the order of their store.

    verdicts  int8 [N]     1 right, 0 wrong, -1 not checked
    lengths   int [N]      tokens; the question, which all share, included or not
    scores    float64 [N]  of the name the builder asks for; NaN where the trace has none
    """

    verdicts: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray

    def which(self, verdict: int) -> np.ndarray:
        """int64: the answers with this verdict."""
        return np.flatnonzero(np.asarray(self.verdicts) == verdict)


@dataclass(frozen=True, kw_only=True)
class Builder(ABC):
    """What makes units of the answers to one question."""

    @property
    def reads(self) -> str:
        """Name of the score of a trace that it compares; "" for none."""
        return ""

    @property
    def mismatched(self) -> bool:
        """Whether every unit is followed by its question with an answer to another one (KTO's z0)."""
        return False

    @abstractmethod
    def __call__(self, answers: Answers, rng: np.random.Generator) -> np.ndarray:
        """int64 [U,2]: chosen and rejected answer of each unit, -1 where it has only the other one."""


@dataclass(frozen=True, kw_only=True)
class RightWrong(Builder):
    """Right answers against wrong ones: `limit` different pairs of the product, drawn at random; None: all of it.

    limit=1 is the usual one random right against one random wrong answer; AdaR1 keeps 4 (2504.21659, its code).
    """

    limit: int | None = 1

    def __post_init__(self) -> None:
        _positive("RightWrong.limit", self.limit)

    def __call__(self, answers: Answers, rng: np.random.Generator) -> np.ndarray:
        right, wrong = answers.which(RIGHT), answers.which(WRONG)
        n = len(right) * len(wrong)
        drawn = np.arange(n) if self.limit is None or n <= self.limit else np.sort(
            rng.choice(n, self.limit, replace=False))
        return np.stack([right[drawn // max(1, len(wrong))], wrong[drawn % max(1, len(wrong))]], axis=1)


@dataclass(frozen=True, kw_only=True)
class Shortest(Builder):
    """The shortest right answer against the `limit` longest ones of a kind; equal lengths: the first in the store.

    against  "wrong"; "right": shorter is better among right answers (AdaR1's instance pairs), only longer ones than the
             chosen are rejected; "any": both
    """

    against: Literal["wrong", "right", "any"] = "wrong"
    limit: int = 1

    def __post_init__(self) -> None:
        _positive("Shortest.limit", self.limit)

    def __call__(self, answers: Answers, rng: np.random.Generator) -> np.ndarray:
        right, wrong, length = answers.which(RIGHT), answers.which(WRONG), np.asarray(answers.lengths, np.int64)
        if not len(right):
            return nothing()
        best = right[np.argmin(length[right])]
        worse = right[length[right] > length[best]]
        kinds = {"wrong": wrong, "right": worse, "any": np.sort(np.concatenate([wrong, worse]))}
        others = kinds[self.against]
        rejected = others[np.argsort(-length[others], kind="stable")[:self.limit]]
        return np.stack([np.full(len(rejected), best), rejected], axis=1)


@dataclass(frozen=True, kw_only=True)
class BestWorst(Builder):
    """The answer with the highest score against the one with the lowest (BOLT, 2502.03860); equal scores: the first in
    the store. Answers without the score take no part.

    score  name among `Trace.scores`: "reward" of a round of RL, "mean_logprob" of sampled answers, ...
    gap    least difference of the two scores; equal ones never make a pair
    right  only a right answer can be chosen
    """

    score: str = "reward"
    gap: float = 0.0
    right: bool = False

    def __post_init__(self) -> None:
        if not self.score or self.gap < 0:
            raise ValueError(f"BestWorst needs the name of a score and a gap >= 0, got {self.score!r} and {self.gap}")

    @property
    def reads(self) -> str:
        return self.score

    def __call__(self, answers: Answers, rng: np.random.Generator) -> np.ndarray:
        scores = np.asarray(answers.scores, np.float64)
        known = np.isfinite(scores)
        may = known & (np.asarray(answers.verdicts) == RIGHT) if self.right else known
        if not may.any():
            return nothing()
        best = int(np.argmax(np.where(may, scores, -np.inf)))
        worst = int(np.argmin(np.where(known, scores, np.inf)))
        apart = scores[best] - scores[worst]
        return np.array([[best, worst]], np.int64) if apart > 0 and apart >= self.gap else nothing()


@dataclass(frozen=True, kw_only=True)
class Singles(Builder):
    """Every judged answer on its own: right ones are desirable, wrong ones undesirable (KTO, 2402.01306).

    limit    at most so many of either kind for a question, drawn at random; None: all
    measure  follow each by its question with an answer to another question: what KTO's z0 is measured on. Doubles the
             tokens of a batch
    """

    limit: int | None = None
    measure: bool = True

    def __post_init__(self) -> None:
        _positive("Singles.limit", self.limit)

    @property
    def mismatched(self) -> bool:
        return self.measure

    def __call__(self, answers: Answers, rng: np.random.Generator) -> np.ndarray:
        right, wrong = (self._some(answers.which(v), rng) for v in (RIGHT, WRONG))
        units = np.full((len(right) + len(wrong), 2), NOBODY, np.int64)
        units[:len(right), 0], units[len(right):, 1] = right, wrong
        return units

    def _some(self, found: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.limit is None or len(found) <= self.limit:
            return found
        return np.sort(rng.choice(found, self.limit, replace=False))


class Built(NamedTuple):
    """units int64 [U,2]: chosen and rejected row, -1 for none, question by question in order of first appearance;
    questions: how many there were; without: those that gave no unit; equal: pairs left out as both rows are the same.
    """

    units: np.ndarray
    questions: int
    without: int
    equal: int


def build_units(build: Builder, groups: Sequence[str], answers: Answers, seed: int, *,
                content: np.ndarray | None = None) -> Built:
    """Units of all questions: `groups` [N] names the question of each row of `answers`.

    content [N]: equal where rows hold the same; such rows never make a pair.
    """
    of: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        of.setdefault(group, []).append(i)
    found, without, equal = [nothing()], 0, 0
    for group, numbers in of.items():
        rows = np.array(numbers, np.int64)
        units = build(Answers(verdicts=answers.verdicts[rows], lengths=answers.lengths[rows],
                              scores=answers.scores[rows]), np.random.default_rng([seed, 4, _number(group)]))
        units = np.where(units == NOBODY, NOBODY, rows[units])
        if content is not None:
            same = (units != NOBODY).all(axis=1) & (content[units[:, 0]] == content[units[:, 1]])
            units, equal = units[~same], equal + int(same.sum())
        found.append(units)
        without += not len(units)
    return Built(np.concatenate(found), len(of), without, equal)


def nothing() -> np.ndarray:
    """No units: int64 [0,2]."""
    return np.zeros((0, 2), np.int64)


def _number(group: str) -> int:
    return int.from_bytes(hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _positive(name: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"{name} is a number of units of a question, at least 1, got {limit}")
