"""Rows that are traces already: what `Trace.to_json` writes, as `distill-jax world` does."""

from dataclasses import dataclass, replace

from distill_jax.traces.formats.base import only_traces
from distill_jax.traces.formats.read import Row
from distill_jax.traces.formats.text import Reject
from distill_jax.traces.trace import Trace


def is_trace(row: Row) -> bool:
    """Whether a row has the segments of a `Trace`, each with role and text."""
    segments = row.get("segments")
    return isinstance(segments, list) and bool(segments) and all(
        isinstance(s, dict) and {"role", "text"} <= s.keys() for s in segments)


@dataclass(frozen=True, kw_only=True)
class TraceFormat:
    """Takes a trace as it is; one that does not say where it came from gets file and row."""

    name: str = "traces of distill_jax"

    def records(self, row: Row, source: str, index: int) -> list[Trace | Reject]:
        if not is_trace(row):
            raise Reject("not_a_trace", f"fields: {', '.join(map(str, row))}")
        try:
            trace = Trace.from_json(row)
        except (ValueError, TypeError, AttributeError, KeyError) as e:
            raise Reject("not_a_trace", str(e)[:200]) from None
        if not (trace.thinking or trace.answer):
            raise Reject("no_response", "the trace ends with its question")
        known = trace.provenance
        if not known.source:
            trace = trace.replace(provenance=replace(known, source=source, row=index))
        return [trace]

    def traces(self, row: Row, source: str, index: int) -> list[Trace]:
        return only_traces(self.records(row, source, index))
