"""Answers alone: the counterpart of a student that learns to think."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.core.roles import INJECTED, THINK
from distill_jax.traces.ops.base import Scope
from distill_jax.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class StripThinking:
    """Removes thinking (and injected) segments. The answer's context changes, so teacher signals do not survive."""

    scope: Scope = "trace"
    keeps_context: bool = False
    name: str = "strip_thinking"

    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
        return [t.replace(segments=tuple(s for s in t.segments if s.role not in (THINK, INJECTED))) for t in traces]
