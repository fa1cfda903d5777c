"""`doctor`: the silent failures of distillation runs, looked for on a sample before they cost a run.

A check is a function `(Patient) -> list[Finding]` of `jobs.checks`; it says what is wrong and how to mend it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_jax.jobs.checks import CHECKS
from distill_jax.jobs.patient import Finding, Patient, Severity

STYLE = {"error": "bold red", "warning": "yellow", "note": "cyan"}

Check = Callable[[Patient], list[Finding]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in one store. checks: names of the checks that ran."""

    path: str
    rows: int
    looked_at: int
    checks: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    def worst(self) -> Severity | None:
        found = {f.severity for f in self.findings}
        order: tuple[Severity, ...] = ("error", "warning", "note")
        return next((s for s in order if s in found), None)


def examine(patient: Patient, checks: Sequence[Check] | None = None) -> Report:
    """Run the checks. Nothing to look at is itself an error."""
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
