"""Rejection sampling: only traces whose answer was found right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.traces.ops.base import Scope
from distill_jax.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class KeepCorrect:
    """Drops traces whose verdict is False. unchecked: whether those nobody could check (None) stay."""

    unchecked: bool = False
    scope: Scope = "trace"
    keeps_context: bool = True

    @property
    def name(self) -> str:
        return "keep_correct(unchecked)" if self.unchecked else "keep_correct"

    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
        return [t for t in traces if t.verdict or (t.verdict is None and self.unchecked)]
