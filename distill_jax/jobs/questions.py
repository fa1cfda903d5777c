"""Questions for `generate`: from a file that an importer reads, or from a store."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from distill_jax.traces.formats import Reject, load_join, parse_map
from distill_jax.traces.formats.questions import prompt_only, read_questions
from distill_jax.traces.store import TraceStore
from distill_jax.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A row of the input: the question to ask, or why it is not asked."""

    index: int
    row: Any
    question: Trace | None = None
    reject: Reject | None = None


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """source: file, or folder or URL of a store. maps, joins: `--map`, `--join`. limit: read at most so many rows."""

    source: str
    maps: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--max-questions must be at least 1, got {self.limit}")

    def read(self) -> list[Asked]:
        """Every row, each question once. Raises ValueError where there is none at all."""
        asked = list(once(islice(self._rows(), self.limit)))
        if not any(a.question for a in asked):
            why = next((f"; the first row: {a.reject}" for a in asked), "")
            raise ValueError(f"{self.source}: no question in {len(asked):,} rows{why}")
        return asked

    def _rows(self) -> Iterator[Asked]:
        if "://" in self.source or Path(self.source).is_dir():
            for i, trace in enumerate(TraceStore.open(self.source).traces()):
                yield _of_trace(i, trace)
            return
        fields, joins = parse_map(self.maps), [load_join(j) for j in self.joins]
        for i, (row, found) in enumerate(read_questions(self.source, fields, joins)):
            if isinstance(found, Reject):
                yield Asked(index=i, row=row, reject=found)
            else:
                yield Asked(index=i, row=row, question=found)


def of_traces(traces: Iterable[Trace]) -> list[Asked]:
    """Questions that are at hand already, answered or not; each once."""
    return list(once(_of_trace(i, t) for i, t in enumerate(traces)))


def _of_trace(index: int, trace: Trace) -> Asked:
    try:
        return Asked(index=index, row={"question": trace.question, "gold": trace.gold}, question=prompt_only(trace))
    except Reject as e:
        return Asked(index=index, row=trace.to_json(), reject=e)


def once(asked: Iterable[Asked]) -> Iterator[Asked]:
    """The same rows; a question that was there before is rejected: equal seeds would give it equal answers."""
    seen: set[str] = set()
    for a in asked:
        if a.question is not None and a.question.group in seen:
            yield Asked(index=a.index, row=a.row, reject=Reject("duplicate_question"))
            continue
        if a.question is not None:
            seen.add(a.question.group)
        yield a


def identity(source: str, asked: Sequence[Asked]) -> dict[str, Any]:
    """Name, number and content of the questions, for a store to remember."""
    h = hashlib.blake2b(digest_size=12)
    for a in asked:
        known = [a.question.id, a.question.gold, dict(a.question.meta)] if a.question else None
        h.update(json.dumps(known, default=str).encode() + b"\n")
    return {"path": source, "rows": len(asked), "hash": h.hexdigest()}
