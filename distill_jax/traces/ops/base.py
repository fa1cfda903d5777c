"""What an Op is. One operator per file beside this one; a pipeline is an Op as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from distill_jax.traces.trace import Trace

Scope = Literal["trace", "group", "corpus"]


@runtime_checkable
class Op(Protocol):
    """Maps the traces of one scope (one trace, all traces of a question, the whole corpus) to a list of traces.

    scope          what a call receives
    keeps_context  True when tokens after an edit keep the context they had (a filter does; a pruner does not):
                   teacher signals stay valid only then
    name           logged into `Trace.provenance.ops`
    A call must be deterministic given the traces and the generator's seed, and must not change its input.
    """

    scope: Scope
    keeps_context: bool

    @property
    def name(self) -> str: ...
    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]: ...


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Ops one after the other, as an Op over the corpus."""

    ops: tuple[Op, ...]
    scope: Scope = "corpus"

    @property
    def keeps_context(self) -> bool:
        return all(op.keeps_context for op in self.ops)

    @property
    def name(self) -> str:
        return " > ".join(op.name for op in self.ops)

    def __call__(self, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
        out = list(traces)
        for op in self.ops:
            out = run_op(op, out, rng)
        return out


def run_op(op: Op, traces: Sequence[Trace], rng: np.random.Generator) -> list[Trace]:
    """Apply `op` to every unit of its scope, in order of first appearance; survivors log the op's name."""
    if op.scope == "corpus":
        units: list[list[Trace]] = [list(traces)]
    elif op.scope == "trace":
        units = [[t] for t in traces]
    else:
        groups: dict[str, list[Trace]] = {}
        for t in traces:
            groups.setdefault(t.group, []).append(t)
        units = list(groups.values())
    if isinstance(op, Pipeline):
        return op(traces, rng)
    return [t.logged(op.name) for unit in units for t in op(unit, rng)]
