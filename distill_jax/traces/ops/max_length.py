"""A bound on what a trace may cost, before there are tokens to count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.core.roles import SUPERVISED
from distill_jax.traces.ops.base import Scope
from distill_jax.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class MaxLength:
    """Drops traces that are longer. Nothing is cut: a trace without its end teaches not to end.

    chars    most characters of the whole trace, None for no bound
    written  most characters of what the model wrote (thinking, answers, tool calls)
    """

    chars: int | None = None
    written: int | None = None
    scope: Scope = "trace"
    keeps_context: bool = True

    def __post_init__(self) -> None:
        if self.chars is None and self.written is None:
            raise ValueError("max_length needs a bound: chars=, written= or both")

    @property
    def name(self) -> str:
        bounds = {"chars": self.chars, "written": self.written}
        return f"max_length({','.join(f'{k}={v}' for k, v in bounds.items() if v is not None)})"

    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
        return [t for t in traces if self._fits(t)]

    def _fits(self, trace: Trace) -> bool:
        written = sum(len(s.text) for s in trace.segments if s.role in SUPERVISED)
        whole = sum(len(s.text) for s in trace.segments)
        return (self.chars is None or whole <= self.chars) and (self.written is None or written <= self.written)
