"""Ops for tests: of a question, with a draw; slow ones that leave a mark. And slow parts of `score`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_jax.jobs import score as score_module
from distill_jax.jobs.parts import Part
from distill_jax.jobs.ray_parts import part_of
from distill_jax.jobs.score import ScoreJob
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


def score_slowly(job: ScoreJob, seconds: float, log: str, part: Part) -> dict[str, Any]:
    """A part of `score`, with a pause in each shard; a shard that is begun leaves its first row in the file `log`."""
    real = score_module._score_shard

    def slow(scorer, reader, items, header):
        with open(log, "a") as f:
            f.write(f"{items[0].number}\n")
        time.sleep(seconds)
        return real(scorer, reader, items, header)

    score_module._score_shard = slow
    try:
        return part_of(score_module.score, job, "", part)
    finally:
        score_module._score_shard = real
