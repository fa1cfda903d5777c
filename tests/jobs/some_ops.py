"""Ops for tests: of a question, with a draw, slow, and one that leaves nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.traces.ops.base import Scope
from distill_jax.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class OnePerQuestion:
    """A trace of each question, drawn."""

    scope: Scope = "group"
    keeps_context: bool = True
    name: str = "one_per_question"

    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
        return [traces[int(rng.integers(len(traces)))]]


@dataclass(frozen=True, kw_only=True)
class Slow:
    """The same traces, `seconds` later; every call leaves a line in the file `log`."""

    seconds: float
    log: str
    scope: Scope = "trace"
    keeps_context: bool = True
    name: str = "slow"

    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
        time.sleep(self.seconds)
        with open(self.log, "a") as f:
            f.write(f"{traces[0].id}\n")
        return list(traces)
