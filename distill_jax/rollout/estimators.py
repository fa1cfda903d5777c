"""Advantages that differ from token to token, or need more than rewards: a critic's values, a reference's log-probs.

`Reinforce(advantage=...)` takes a function of rewards and groups, or one of these frozen dataclasses. Each names the
providers whose values (`critic`) and log-probs (`reference`) of the sampled tokens it reads, "" for none; the trainer
asks them with the parameters that sampled. The arithmetic is that of `rollout.advantages`.

Arrays are over an answer's trained tokens [T] (of a role the student writes), in order. An answer that was cut counts
as finished: the value after its last token is 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill_jax.rollout.advantages import (
    batch_z,
    gae,
    leave_one_out,
    multi_gamma,
    penalised,
    reinforce_plus_plus,
    token_rewards,
)

Array = np.ndarray[Any, Any]
ADVANTAGES, RETURNS, VALUES = "advantages", "returns", "old_values"
"""Stream fields that estimators write; the last two only those with a critic."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an estimator reads of an answer.

    reward     R of the whole answer
    group      number of its question
    ids        int32 [T] sampled tokens
    logprobs   float32 [T] of the policy that sampled them
    values     float32 [T] V of the state before each token; None without a critic
    reference  float32 [T] log-probs of the reference; None without one
    trained    whether it is trained on: statistics of a batch are over those that are
    """

    reward: float
    group: int
    ids: Array
    logprobs: Array
    values: Array | None = None
    reference: Array | None = None
    trained: bool = True


class Estimator(ABC):
    """critic, reference: names of the providers it reads, "" for none."""

    critic: str = ""
    reference: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stream fields it writes."""
        return (ADVANTAGES, RETURNS, VALUES) if self.critic else (ADVANTAGES,)

    @abstractmethod
    def __call__(self, answers: Sequence[Answer]) -> list[dict[str, Array]]:
        """{field: float [T]} of each answer of a round."""


@dataclass(frozen=True, kw_only=True)
class Channel:
    """Further rewards of single tokens: fn(ids, **kwargs) -> [T], discounted by `gamma`."""

    fn: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    gamma: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Gae(Estimator):
    """PPO's advantages: generalised advantage estimates (1506.02438, eq. 16) of token rewards
    1[last] R - beta (log old - log reference), and the critic's targets A + V (fields `returns`, `old_values`).

    critic     provider with the values (`recipe.Critic`); "": V = 0, what is left are returns to go
    channels   token rewards with discounts of their own (multi-gamma, Demystifying Long CoT, 2502.03373); need lam=1
    whiten     advantages minus their mean over their deviation, of all trained tokens of the round; returns never
    """

    gamma: float = 1.0
    lam: float = 0.95
    critic: str = "critic"
    reference: str = ""
    beta: float = 0.0
    channels: Mapping[str, Channel] = field(default_factory=dict)
    whiten: bool = True

    def __post_init__(self) -> None:
        _check_kl(self)
        for name, value in (("gamma", self.gamma), ("lam", self.lam), *(
                (f"channels.{n}.gamma", c.gamma) for n, c in self.channels.items())):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Gae.{name} must be in [0, 1], got {value}")
        if self.channels and self.lam != 1.0:
            raise ValueError(f"one critic for several discounts needs lam=1, got lam={self.lam}")
        if "outcome" in self.channels:
            raise ValueError("Gae.channels: 'outcome' is the reward of the whole answer; name this one differently")

    def __call__(self, answers: Sequence[Answer]) -> list[dict[str, Array]]:
        advantages = [self._advantages(a) for a in answers]
        out: list[dict[str, Array]] = [{ADVANTAGES: x} for x in advantages]
        for fields, a in zip(out, answers):
            if self.critic:
                assert a.values is not None
                fields |= {RETURNS: fields[ADVANTAGES] + a.values, VALUES: a.values}
        if self.whiten:
            trained = np.repeat([a.trained for a in answers], [len(x) for x in advantages])
            flat = batch_z(np.concatenate([*advantages, np.zeros(0)]), over=trained)
            for fields, x in zip(out, np.split(flat, np.cumsum([len(x) for x in advantages])[:-1])):
                fields[ADVANTAGES] = x
        return out

    def _advantages(self, a: Answer) -> Array:
        rewards = token_rewards(a.reward, a.logprobs, a.reference, beta=self.beta)
        if not self.channels:
            return gae(rewards, a.values, gamma=self.gamma, lam=self.lam)
        said = {name: np.asarray(c.fn(a.ids.tolist(), **c.kwargs), np.float64) for name, c in self.channels.items()}
        return multi_gamma({"outcome": rewards, **said},
                           {"outcome": self.gamma, **{n: c.gamma for n, c in self.channels.items()}}, a.values)


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(Estimator):
    """REINFORCE++ (2501.03262): returns to go of the token rewards 1[last] R - beta (log old - log reference),
    normalised over all trained tokens of the round. No critic and no groups: n=1 is enough, with equal="keep"."""

    gamma: float = 1.0
    reference: str = ""
    beta: float = 0.0
    ddof: int = 1

    def __post_init__(self) -> None:
        _check_kl(self)

    def __call__(self, answers: Sequence[Answer]) -> list[dict[str, Array]]:
        rewards = [token_rewards(a.reward, a.logprobs, a.reference, beta=self.beta) for a in answers]
        return [{ADVANTAGES: x} for x in reinforce_plus_plus(
            rewards, gamma=self.gamma, ddof=self.ddof, over=[a.trained for a in answers])]


@dataclass(frozen=True, kw_only=True)
class Penalised(Estimator):
    """An advantage of whole answers on R - beta KL, KL the sum over tokens of log old - log reference: the KL in the
    reward of RLOO (2402.14740). Groups of equal rewards differ by their KL: equal="keep".

    advantage  (rewards [N], groups [N]) -> [N] of `rollout.advantages`
    """

    advantage: Callable[..., Any] = leave_one_out
    reference: str = "reference"
    beta: float = 0.05

    def __post_init__(self) -> None:
        _check_kl(self)

    def __call__(self, answers: Sequence[Answer]) -> list[dict[str, Array]]:
        kls = [float(np.sum(a.logprobs - a.reference)) if a.reference is not None else 0.0 for a in answers]
        rewards = penalised([a.reward for a in answers], kls, beta=self.beta)
        advantages = self.advantage(rewards, np.array([a.group for a in answers], np.int64))
        return [{ADVANTAGES: np.full(len(a.ids), x)} for a, x in zip(answers, np.asarray(advantages).tolist())]


def _check_kl(estimator: Any) -> None:
    """Raises ValueError where a KL is asked for without a reference, or a reference without a weight."""
    name = type(estimator).__name__
    if estimator.beta < 0.0 or bool(estimator.beta) != bool(estimator.reference):
        raise ValueError(f"{name}: the KL in the reward needs beta > 0 and reference=PROVIDER, no KL neither; got "
                         f"beta={estimator.beta} and reference={estimator.reference!r}")
