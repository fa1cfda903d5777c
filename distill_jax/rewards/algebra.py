"""Rewards as plain functions, and how they combine.

A reward reads samples and says numbers. What it may look at is its scope, and its signature:

    sample    fn(sample, **kwargs) -> float                          the default
    group     fn(samples of one prompt, **kwargs) -> [float]         marked `@group`
    batch     fn(samples of the whole batch, **kwargs) -> [float]    marked `@batch`
    stateful  an object with init(), value(samples, state), update(samples, state): see `Stateful`

Numbers come back in the order of the samples. Functions and their numbers are composed by nodes (`Reward`, `Sum`,
`Product`, `Clip`, `Where`), frozen dataclasses that a recipe can hold and YAML can write:

    Sum(parts={"right": Reward(outcome), "short": Where(Reward(cosine), on=right)}, weights={"short": 0.5})

Every node of the tree is a named part of what is logged: `right`, `short`. A function that raises, or says something
that is not a finite number, scores 0 there and is counted; it never stops a run.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np

from distill_jax.rewards.sample import Sample, groups_of

Scope = Literal["sample", "group", "batch"]
Fn = Callable[..., Any]
State = Any
"""What a stateful reward carries from step to step: a small tree of dicts and NumPy arrays, checkpointed as it is."""

_log = logging.getLogger(__name__)


def group(fn: Fn) -> Fn:
    """Marks a reward that is called once per prompt, with its samples in order."""
    fn.scope = "group"  # type: ignore[attr-defined]
    return fn


def batch(fn: Fn) -> Fn:
    """Marks a reward that is called once with all samples of the global batch."""
    fn.scope = "batch"  # type: ignore[attr-defined]
    return fn


def scope_of(fn: Fn) -> Scope:
    return cast(Scope, getattr(fn, "scope", "sample"))


@runtime_checkable
class Stateful(Protocol):
    """A reward with a memory. All three are pure: the trainer owns the state and checkpoints it."""

    def init(self) -> State: ...

    def value(self, samples: Sequence[Sample], state: State) -> Sequence[float]:
        """The rewards of the whole batch."""
        ...

    def update(self, samples: Sequence[Sample], state: State) -> State:
        """The state after seeing `samples`: a monitoring set, or the batch. The trainer decides when."""
        ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a reward says of a batch of N samples.

    values     float64 [N]
    parts      {path: float64 [N]} of every named part below, before its weight
    failures   {path: how often it raised or was not finite}
    """

    values: np.ndarray
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean of the reward and of its parts, for the log."""
        if not len(self.values):
            return {}
        return {"reward": float(self.values.mean()), **{f"reward/{k}": float(v.mean()) for k, v in self.parts.items()}}


class Node(ABC):
    """A reward of any shape. `score` is pure; `init` and `update` handle the states of the stateful ones below."""

    def children(self) -> Mapping[str, "Node"]:
        return {}

    def init(self) -> State:
        """{name of a child: its state}, without those that have none."""
        states = {name: child.init() for name, child in self.children().items()}
        return {name: state for name, state in states.items() if state}

    def update(self, samples: Sequence[Sample], state: State) -> State:
        return {name: self.children()[name].update(samples, s) for name, s in state.items()}

    @abstractmethod
    def score(self, samples: Sequence[Sample], state: State) -> Scores:
        """Numbers for the whole batch."""


@dataclass(frozen=True, kw_only=True)
class Reward(Node):
    """One function, or one stateful object, with its settings.

    Raises ValueError when built with something that cannot be called.
    """

    fn: Fn | Stateful
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.fn) and not isinstance(self.fn, Stateful):
            raise ValueError(f"Reward(fn={self.fn!r}): expected a function, or an object with init, value and update")
        if isinstance(self.fn, Stateful) and self.kwargs:
            raise ValueError(f"Reward(fn={self.fn!r}) has its own settings; kwargs are for functions")

    def init(self) -> State:
        return self.fn.init() if isinstance(self.fn, Stateful) else {}

    def update(self, samples: Sequence[Sample], state: State) -> State:
        return self.fn.update(samples, state) if isinstance(self.fn, Stateful) else state

    def score(self, samples: Sequence[Sample], state: State) -> Scores:
        values, failures = np.zeros(len(samples)), 0
        for index, call in self._calls(samples, state):
            try:
                said = np.asarray(call(), np.float64).reshape(-1)
                if len(said) != len(index):
                    raise ValueError(f"{len(said)} rewards for {len(index)} samples")
            except Exception as e:
                failures += len(index)
                _log.warning("reward %s failed: %s: %s", self._name, type(e).__name__, str(e)[:200])
                continue
            good = np.isfinite(said)
            failures += int((~good).sum())
            values[index] = np.where(good, said, 0.0)
        return Scores(values=values, failures={"": failures} if failures else {})

    def _calls(self, samples: Sequence[Sample], state: State) -> list[tuple[list[int], Callable[[], Any]]]:
        """(which samples, what to call for their rewards): the unit of a failure is the unit of a call."""
        everything = list(range(len(samples)))
        fn = self.fn
        if isinstance(fn, Stateful):
            return [(everything, lambda: fn.value(samples, state))]
        call = lambda of: lambda: fn(of, **self.kwargs)
        if scope_of(fn) == "sample":
            return [([i], call(s)) for i, s in enumerate(samples)]
        if scope_of(fn) == "group":
            return [(index, call([samples[i] for i in index])) for index in groups_of(samples)]
        return [(everything, call(samples))] if samples else []

    @property
    def _name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)


def _below(node: Node, samples: Sequence[Sample], state: State) -> tuple[dict[str, Scores], dict[str, np.ndarray],
                                                                          dict[str, int]]:
    """Scores of the children, and their parts and failures under their names."""
    scores = {name: child.score(samples, (state or {}).get(name)) for name, child in node.children().items()}
    parts: dict[str, np.ndarray] = {}
    failures: dict[str, int] = {}
    for name, s in scores.items():
        join = lambda path, name=name: "/".join(filter(None, (name, path)))
        parts |= {join(""): s.values, **{join(p): v for p, v in s.parts.items()}} if name else dict(s.parts)
        failures |= {join(p): n for p, n in s.failures.items()}
    return scores, parts, failures


@dataclass(frozen=True, kw_only=True)
class Sum(Node):
    """sum_k weight_k part_k; a weight that is not given is 1. Raises ValueError for a weight of no part."""

    parts: Mapping[str, Node]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _named(self.parts)
        if unknown := set(self.weights) - set(self.parts):
            raise ValueError(f"weights for {sorted(unknown)}, but the parts are {sorted(self.parts)}")

    def children(self) -> Mapping[str, Node]:
        return self.parts

    def score(self, samples: Sequence[Sample], state: State) -> Scores:
        scores, parts, failures = _below(self, samples, state)
        total = sum((self.weights.get(k, 1.0) * s.values for k, s in scores.items()), np.zeros(len(samples)))
        return Scores(values=total, parts=parts, failures=failures)


@dataclass(frozen=True, kw_only=True)
class Product(Node):
    """prod_k part_k: a part of 0 and 1 gates the others (format, correctness)."""

    parts: Mapping[str, Node]

    def __post_init__(self) -> None:
        _named(self.parts)

    def children(self) -> Mapping[str, Node]:
        return self.parts

    def score(self, samples: Sequence[Sample], state: State) -> Scores:
        scores, parts, failures = _below(self, samples, state)
        value = np.prod([s.values for s in scores.values()], axis=0)
        return Scores(values=value, parts=parts, failures=failures)


@dataclass(frozen=True, kw_only=True)
class Clip(Node):
    """The reward between two bounds, either of which may be missing."""

    reward: Node
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"Clip needs low <= high, got {self.low} and {self.high}")

    def children(self) -> Mapping[str, Node]:
        return {"": self.reward}

    def score(self, samples: Sequence[Sample], state: State) -> Scores:
        scores, parts, failures = _below(self, samples, state)
        return Scores(values=np.clip(scores[""].values, self.low, self.high), parts=parts, failures=failures)


@dataclass(frozen=True, kw_only=True)
class Where(Node):
    """The reward of samples for which `on` holds, `otherwise` for the rest: a length reward of correct answers only.

    The inner reward still sees every sample, so group statistics are those of the whole group; a reward that means
    correct ones only takes their statistics itself. A sample for which `on` raises gets 0, and is counted.
    """

    reward: Node
    on: Callable[[Sample], bool]
    otherwise: float = 0.0

    def children(self) -> Mapping[str, Node]:
        return {"": self.reward}

    def score(self, samples: Sequence[Sample], state: State) -> Scores:
        scores, parts, failures = _below(self, samples, state)
        gate = Reward(fn=self.on).score(samples, None)
        value = np.where(gate.values != 0, scores[""].values, self.otherwise)
        if gate.failures:
            value = np.where([_raises(self.on, s) for s in samples], 0.0, value)
            failures = {**failures, "on": gate.failures[""]}
        return Scores(values=value, parts=parts, failures=failures)


def _raises(fn: Callable[[Sample], bool], sample: Sample) -> bool:
    try:
        return not math.isfinite(fn(sample))
    except Exception:
        return True


def _named(parts: Mapping[str, Node]) -> None:
    if not parts:
        raise ValueError("a combination needs at least one part")
    for name, part in parts.items():
        if not name or "/" in name or not isinstance(part, Node):
            raise ValueError(f"part {name!r}: expected a name without '/' and a reward (Reward(fn=...), Sum, Product, "
                             f"Clip, Where), got {type(part).__name__}")
