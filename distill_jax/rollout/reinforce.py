"""Reinforcement from the student's own answers: what a stage says about rewards, advantages and what is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from distill_jax.rewards.algebra import Node, Reward
from distill_jax.rewards.outcome import outcome
from distill_jax.rollout.advantages import group_z
from distill_jax.rollout.estimators import Estimator
from distill_jax.rollout.on_policy import OnPolicy

Judge = Literal["answers", "knights", "code"]


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Questions that are asked apart every `every` updates, the same ones each time: what a reward with a memory learns
    from them, and from nothing else. Nobody trains on the answers. The defaults are LASER-D's (2505.15612).
    """

    prompts: int = 500
    n: int = 8
    every: int = 20

    def __post_init__(self) -> None:
        if min(self.prompts, self.n, self.every) < 1:
            raise ValueError(f"Monitor needs prompts, n and every of at least 1, got {self}")


@dataclass(frozen=True, kw_only=True)
class Reinforce(OnPolicy):
    """Groups of `n` answers to each of `prompts` questions; each is judged, rewarded and given an advantage.

    A round is used once, by the `every` updates that follow it: at `every=1` every update is strictly on-policy. Terms
    are `TokenTerm`s on the stream fields `advantages`, `behaviour_logprobs` and `group_ids`.

    judge      who finds what is right: the answer checker, Knights and Knaves by person, unit tests in a sandbox
    reward     what an answer is worth (`rewards.algebra`)
    advantage  (rewards [N], groups [N]) -> [N], `rollout.advantages`; or an estimator for single tokens, which may ask
               a critic and a reference (`rollout.estimators`: `Gae`, `ReinforcePlusPlus`, `Penalised`)
    equal      groups whose rewards are all equal: "drop" them (no gradient under a group baseline), or "keep"
    refill     most further samplings that fill up what was dropped with other questions (DAPO's dynamic sampling)
    monitor    what a reward with a memory follows in place of the answers that are trained on; None: those
    truncated  answers that the length limit cut: "train" on them, or "mask" them (overlong filtering)
    unsafe_code  judge="code" where the platform cannot shut programs in: run them as this user, with limits only
    """

    share: float = 1.0
    every: int = 1
    prompts: int = 64
    n: int = 8
    judge: Judge = "answers"
    reward: Node = Reward(fn=outcome)
    advantage: Callable[..., Any] | Estimator = group_z
    equal: Literal["drop", "keep"] = "drop"
    refill: int = 0
    truncated: Literal["train", "mask"] = "train"
    unsafe_code: bool = False
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share != 1.0:
            raise ValueError(f"Reinforce learns from the student's answers alone, got share={self.share}; other "
                             "sequences belong into a stage of their own")
        if self.n < 2 and self.equal == "drop":
            raise ValueError(f"n={self.n} answers to a question always have equal rewards: raise n, or equal='keep'")
        if self.unsafe_code and self.judge != "code":
            raise ValueError(f"unsafe_code=True allows judge='code' to run programs without isolation, and judge is "
                             f"{self.judge!r}: drop one of them")
        if self.monitor and self.monitor.every % self.every:
            raise ValueError(f"monitor.every must be a multiple of every={self.every}, the updates between two rounds; "
                             f"got {self.monitor.every}")
        if self.monitor:
            self.environment.check(self.monitor.n, self.sampling)
        if isinstance(self.advantage, Estimator) and self.environment.most_rows() > 1:
            raise ValueError(f"{type(self.advantage).__name__} says something of every token of an answer, and "
                             f"{type(self.environment).__name__} makes several rows of one: take an advantage of whole "
                             "answers (rollout.advantages), or another environment")
        if self.refill < 0 or (self.refill and self.equal == "keep"):
            raise ValueError(f"refill replaces groups that were dropped: needs equal='drop', got refill={self.refill} "
                             f"and equal={self.equal!r}")
