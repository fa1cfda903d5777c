"""The same text twice is one trace."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.traces.ops.base import Scope
from distill_jax.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Keeps the first trace of each content hash (`Trace.id`)."""

    scope: Scope = "corpus"
    keeps_context: bool = True
    name: str = "dedup"

    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
        first: dict[str, Trace] = {}
        for t in traces:
            first.setdefault(t.id, t)
        return list(first.values())
