"""Verdicts for traces that have a gold answer."""

from collections.abc import Sequence

from distill_jax.rewards.check import Pending, Verdict, decide
from distill_jax.rewards.checker import Checker
from distill_jax.rewards.journal import Journal, verdict_key
from distill_jax.traces.trace import FLAG_UNTERMINATED, Trace


def golds_of(trace: Trace) -> list[str]:
    """The gold answer and its alternatives."""
    return [g for g in (trace.gold, *trace.meta.get("golds", ())) if g]


def verify(traces: Sequence[Trace], checker: Checker, journal: Journal | None = None) -> list[tuple[Trace, Verdict]]:
    """Each trace with its verdict set, and what the check found; in order.

    A trace without gold keeps the verdict of its source. What algebra decided, time-outs included, is in the journal
    when this returns; what the journal knows is not asked again. (The other verdicts are functions of the text.)
    """
    steps = [_step(t) for t in traces]
    keys = [verdict_key(t.id, golds_of(t)) if isinstance(s, Pending) else "" for t, s in zip(traces, steps)]
    known = {k: v for k in keys if k and journal is not None and (v := journal.get(k)) is not None}
    asked = {k: s for k, s in zip(keys, steps) if isinstance(s, Pending) and k not in known}
    fresh = dict(zip(asked, checker.settle(list(asked.values()))))
    if journal is not None:
        journal.add(fresh.items())
    known |= fresh
    return [_judged(t, s if isinstance(s, Verdict) else known[k]) for t, s, k in zip(traces, steps, keys)]


def _step(trace: Trace) -> Verdict | Pending:
    golds = golds_of(trace)
    if golds and FLAG_UNTERMINATED in trace.flags:
        return Verdict(correct=False, extracted=None, method="unterminated")
    return decide(trace.answer, golds)


def _judged(trace: Trace, verdict: Verdict) -> tuple[Trace, Verdict]:
    if verdict.method == "no_gold":
        return trace, verdict
    meta = {**trace.meta, "check": verdict.method}
    if verdict.extracted is not None and verdict.extracted != trace.gold and len(verdict.extracted) <= 200:
        meta["extracted"] = verdict.extracted
    return trace.replace(verdict=verdict.correct, meta=meta), verdict
