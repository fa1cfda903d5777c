"""Traces as this package writes them (`distill-jax world --out`, `Trace.to_json`), one a line."""

from dataclasses import dataclass

from distill_jax.traces.formats.base import only_traces
from distill_jax.traces.formats.read import Row
from distill_jax.traces.formats.text import Reject
from distill_jax.traces.trace import Trace


def is_trace(row: Row) -> bool:
    """Whether a row is a `Trace` as JSON."""
    segments = row.get("segments")
    return isinstance(segments, list) and bool(segments) and all(
        isinstance(s, dict) and {"role", "text"} <= s.keys() for s in segments)


@dataclass(frozen=True, kw_only=True)
class TraceFormat:
    """Nothing is guessed: text, gold answer, verdict and where a trace came from are what the row says."""

    name: str = "traces of distill_jax"

    def records(self, row: Row, source: str, index: int) -> list[Trace | Reject]:
        if not is_trace(row):
            raise Reject("not_a_trace", f"fields: {', '.join(map(str, row))}")
        try:
            return [Trace.from_json(row)]
        except (ValueError, TypeError, AttributeError, KeyError) as e:
            raise Reject("not_a_trace", str(e)[:200]) from None

    def traces(self, row: Row, source: str, index: int) -> list[Trace]:
        return only_traces(self.records(row, source, index))
