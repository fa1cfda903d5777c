"""Questions to ask, from any file an importer reads, answered or not: a `Trace` that ends where a model is to write."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill_jax.core.roles import ANSWER, INJECTED, THINK, TOOL, TOOL_CALL
from distill_jax.traces.formats.base import Sample, Style, prompt_segments
from distill_jax.traces.formats.chat import WRITTEN, chat_trace, conversation, speaker, written_apart
from distill_jax.traces.formats.facts import row_facts
from distill_jax.traces.formats.fields import Fields, Join
from distill_jax.traces.formats.layout import find_layout
from distill_jax.traces.formats.own import is_trace
from distill_jax.traces.formats.read import BadRow, Row, iter_rows
from distill_jax.traces.formats.rows import earlier, merge_question
from distill_jax.traces.formats.text import Reject, as_text
from distill_jax.traces.trace import Provenance, Trace

OF_A_SAMPLE = ("check", "extracted", "source_correct", "preference", "messages_dropped")
"""Entries of `meta` that speak of an answer, not of the question."""


def read_questions(path: str | Path, fields: Fields | None = None, joins: Sequence[Join] = ()
                   ) -> Iterator[tuple[Any, Trace | Reject]]:
    """(row, question or why it is none) of every row. Raises ValueError for a file that cannot be read."""
    for index, row in enumerate(iter_rows(path)):
        if isinstance(row, BadRow):
            yield row.text, Reject(row.reason)
            continue
        try:
            for join in joins:
                row = join.apply(row)
            yield row, question_of(row, fields or Fields(), str(path), index)
        except (Reject, ValueError) as e:
            yield row, e if isinstance(e, Reject) else Reject("not_a_trace", str(e))


def question_of(row: Row, fields: Fields, source: str, index: int) -> Trace:
    """The question of a row, with its gold answer where there is one. Raises Reject where there is no question."""
    if is_trace(row):
        trace = Trace.from_json(row)
        return prompt_only(trace.replace(provenance=Provenance(source=source, row=index)))
    path, messages = conversation(row, fields)
    if path is not None:
        facts = row_facts(row, fields, source, index, written_apart(row, fields, path), (path,))
        if speaker(messages[-1]) not in WRITTEN:  # nobody has answered: an empty turn marks where to write
            messages = [*messages, {"role": "assistant", "content": "."}]
        system = as_text(fields.get(row, "system") or "")
        if system and not any(m.get("role", m.get("from")) == "system" for m in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return prompt_only(chat_trace(messages, Sample(text=""), facts, Style()))
    row = merge_question(row)
    asked, question = fields.path(row, "question"), fields.get(row, "question")
    if asked is None or question is None:
        raise Reject("no_question", f"fields: {', '.join(map(str, row))}")
    layout = find_layout(row, fields)
    used = (asked, *(layout.paths if layout is not None else ()))
    response = None if layout is None or layout.reference else layout.response[0]
    facts = row_facts(row, fields, source, index, response, used)
    prompt = prompt_segments(as_text(question), as_text(fields.get(row, "system") or ""), earlier(row))
    return Trace(segments=tuple(prompt), gold=facts.gold, meta=facts.meta,
                 provenance=Provenance(source=source, row=index))


def prompt_only(trace: Trace) -> Trace:
    """The trace up to where its last turn was written; nothing of what is known about that turn."""
    turn, segments = trace.last_turn, []
    for s in trace.segments:
        if s.turn == turn and s.role in (THINK, ANSWER, TOOL_CALL, TOOL, INJECTED):
            break
        segments.append(s)
    if not segments:
        raise Reject("no_question", "the trace begins with an answer")
    meta = {k: v for k, v in trace.meta.items() if k not in OF_A_SAMPLE}
    p = trace.provenance
    return Trace(segments=tuple(segments), gold=trace.gold, group=trace.group, meta=meta,
                 provenance=Provenance(source=p.source, row=p.row))
