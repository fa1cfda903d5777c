"""Defects the importer recognised, taken out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jax.traces.ops.base import Scope
from distill_jax.traces.trace import FLAG_EMPTY_ANSWER, FLAG_TRUNCATED, FLAG_UNTERMINATED, FLAGS, Trace


@dataclass(frozen=True, kw_only=True)
class DropFlags:
    """Drops traces with any of `flags`; by default those that hold no whole answer."""

    flags: tuple[str, ...] = (FLAG_UNTERMINATED, FLAG_EMPTY_ANSWER, FLAG_TRUNCATED)
    scope: Scope = "trace"
    keeps_context: bool = True

    def __post_init__(self) -> None:
        unknown = [f for f in self.flags if f not in FLAGS]
        if unknown:
            raise ValueError(f"unknown flags {unknown}; known flags: {list(FLAGS)}")

    @property
    def name(self) -> str:
        return f"drop_flags({','.join(self.flags)})"

    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
        return [t for t in traces if not set(t.flags) & set(self.flags)]
