"""`doctor`: the silent failures of distillation runs, looked for on a sample before they cost a run.

A check is a function `(Patient) -> list[Finding]` in `jobs.checks`; it says what is wrong and how to mend it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_jax.data.render import render
from distill_jax.data.rowset import matches
from distill_jax.data.sources import Store, choose
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import RowArrays, RowIndex, SignalReader, TraceStore
from distill_jax.traces.trace import Trace

SAMPLE = 256
Severity = Literal["error", "warning", "note"]
STYLE = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """error: the run would be wrong; warning: probably not what was meant; note: handled, worth knowing."""

    check: str
    severity: Severity
    message: str
    mend: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Patient:
    """One store as a student would be fed from it, and a sample of its rows.

    chosen    numbers of the rows the source's filters keep; sample: up to SAMPLE of them, spread over the store
    stored    the sample as it is stored; rows: as the student sees it (rendered again where the store's does not fit)
    """

    def __init__(self, spec: Store, tok: Tokenizer, *, teachers: Mapping[str, Tokenizer] | None = None,
                 vocabularies: Mapping[str, int] | None = None, against: Sequence[str] = ()) -> None:
        self.spec, self.tok = spec, tok
        self.teachers = dict(teachers or {})
        self.vocabularies = dict(vocabularies or {})
        self.against = tuple(against)
        self.store = TraceStore.open(spec.path)
        self.index: RowIndex = self.store.index()
        self.chosen, self.left_out = choose(self.index, spec)
        last = max(len(self.chosen) - 1, 0)
        self.sample = self.chosen[np.unique(np.linspace(0, last, min(SAMPLE, len(self.chosen))).astype(int))]
        self.fits = matches(self.store, tok, spec.style)

    @cached_property
    def stored(self) -> list[RowArrays]:
        return self.store.read(self.sample) if len(self.sample) else []

    @cached_property
    def traces(self) -> list[Trace]:
        return list(self.store.traces(self.sample))

    @cached_property
    def rows(self) -> list[RowArrays]:
        if self.fits:
            return self.stored
        return [render(t, self.tok, style=self.spec.style) for t in self.traces]

    @cached_property
    def signals(self) -> dict[str, SignalReader]:
        return {name: self.store.signal(name) for name in self.store.signals()}


Check = Callable[[Patient], list[Finding]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in one store. checks: names of the checks that ran."""

    path: str
    rows: int
    looked_at: int
    checks: tuple[str, ...]
    findings: tuple[Finding, ...] = field(default=())

    def worst(self) -> Severity | None:
        found = {f.severity for f in self.findings}
        order: tuple[Severity, ...] = ("error", "warning", "note")
        return next((s for s in order if s in found), None)


def examine(patient: Patient, checks: Sequence[Check] | None = None) -> Report:
    """Run the checks. Nothing to look at is itself an error."""
    from distill_jax.jobs.checks import CHECKS

    todo = tuple(checks or CHECKS)
    names = tuple(c.__name__ for c in todo)
    if len(patient.chosen) == 0:
        none = Finding(check="rows", severity="error", message=f"none of {len(patient.store)} rows is trained on: "
                       f"{patient.left_out}", mend="relax verdict=, over_long= or holdout= of the source")
        return Report(path=patient.spec.path, rows=0, looked_at=0, checks=names, findings=(none,))
    found = [f for check in todo for f in check(patient)]
    order = ("error", "warning", "note")
    return Report(path=patient.spec.path, rows=len(patient.chosen), looked_at=len(patient.sample), checks=names,
                  findings=tuple(sorted(found, key=lambda f: order.index(f.severity))))


def print_report(report: Report, console: Console) -> None:
    """The findings, the worst first."""
    console.print(Text(f"{report.path}: {report.rows:,} rows, {report.looked_at} looked at, "
                       f"{len(report.checks)} checks"))
    if not report.findings:
        console.print(Text("nothing found", style="green"))
        return
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
    for f in report.findings:
        table.add_row(Text(f.severity, style=STYLE[f.severity]), Text(f.check, style="bold"),
                      Text.assemble(f.message, ("\n-> " + f.mend, "dim")))
    console.print(table)
