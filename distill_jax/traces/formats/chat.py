"""Conversations: OpenAI-style messages and ShareGPT; several turns, tools, thinking kept apart or in the content."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distill_jax.core.roles import ANSWER, QUESTION, SYSTEM, THINK, TOOL, TOOL_CALL, Role
from distill_jax.traces.formats.base import Sample, Style, is_cut, only_traces, written_segments
from distill_jax.traces.formats.facts import RowFacts, row_facts, source_verdict
from distill_jax.traces.formats.fields import NAMES, Fields, lookup
from distill_jax.traces.formats.read import Row
from distill_jax.traces.formats.text import Reject, as_text
from distill_jax.traces.trace import FLAG_EMPTY_ANSWER, FLAG_MISSING_OPEN, FLAG_TRUNCATED, Provenance, Segment, Trace

SPEAKERS: dict[str, Role] = {
    "system": SYSTEM, "developer": SYSTEM,
    "user": QUESTION, "human": QUESTION,
    "assistant": ANSWER, "gpt": ANSWER, "model": ANSWER, "bot": ANSWER, "chatgpt": ANSWER, "ai": ANSWER,
    "function_call": TOOL_CALL, "tool_call": TOOL_CALL,
    "tool": TOOL, "function": TOOL, "observation": TOOL, "ipython": TOOL, "tool_response": TOOL,
    "function_response": TOOL,
}
WRITTEN = (ANSWER, TOOL_CALL)

PARTS: dict[str, Role] = {
    "text": ANSWER, "output_text": ANSWER, "input_text": ANSWER,
    "reasoning": THINK, "thinking": THINK, "think": THINK, "reasoning_content": THINK,
    "tool_call": TOOL_CALL, "tool_use": TOOL_CALL, "function_call": TOOL_CALL, "function": TOOL_CALL,
    "tool_result": TOOL, "tool_response": TOOL,
}


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A list of messages under some key; `chosen`/`rejected` beside it are two endings of the same conversation."""

    name: str
    fields: Fields = Fields()
    style: Style = Style()

    def records(self, row: Row, source: str, index: int) -> list[Trace | Reject]:
        path, messages = conversation(row, self.fields)
        if path is None:
            raise Reject("no_messages", f"fields: {', '.join(map(str, row))}")
        facts = row_facts(row, self.fields, source, index, written_apart(row, self.fields, path), (path,))
        system = as_text(self.fields.get(row, "system") or "")
        if system and not any(speaker(m) is SYSTEM for m in messages):
            messages = [{"role": "system", "content": system}, *messages]
        correct, scores = source_verdict(self.fields.get(row, "correct"))
        base = Sample(text="", correct=correct, scores=scores, finish=facts.finish)
        out: list[Trace | Reject] = []
        for ending, sample in endings(row, messages, base):
            try:
                out.append(chat_trace(ending, sample, facts, self.style))
            except Reject as e:
                out.append(e)
        return out

    def traces(self, row: Row, source: str, index: int) -> list[Trace]:
        return only_traces(self.records(row, source, index))


def conversation(row: Row, fields: Fields) -> tuple[str | None, list[dict[str, Any]]]:
    """(path, messages) of a row; of several such fields the known names first. (None, []) where there are none."""
    known = fields.path(row, "messages")
    for path in (known, *row):
        value = as_messages(lookup(row, path)) if path is not None else None
        if path is not None and value:
            apart = written_apart(row, fields, path)
            completion = lookup(row, apart) if apart is not None else None
            if isinstance(completion, str):
                return path, [*value, {"role": "assistant", "content": completion}]
            return path, [*value, *completion] if completion else value
    return None, []


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """The messages that a value is, also one written as JSON text (CSV and some Parquet files); None if it is none."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list) and value and all(isinstance(m, dict) and speaker(m) is not None for m in value):
        return value
    return None


def written_apart(row: Row, fields: Fields, path: str) -> str | None:
    """Path of the completion beside a prompt that is a list of messages; None where the messages hold it all."""
    if path == fields.path(row, "messages") or path.lower() not in NAMES["question"]:
        return None
    apart = fields.path(row, "response")
    completion = lookup(row, apart) if apart is not None else None
    messages = isinstance(completion, list) and completion and all(isinstance(m, dict) for m in completion)
    return apart if messages or isinstance(completion, str) else None


def endings(row: Row, messages: list[dict[str, Any]], base: Sample) -> Iterator[tuple[list[dict[str, Any]], Sample]]:
    """The conversation itself, or with its chosen and its rejected last turn."""
    if not {"chosen", "rejected"} <= row.keys():
        yield messages, base
        return
    for kind in ("chosen", "rejected"):
        end = row[kind] if isinstance(row[kind], list | dict) else {"role": "assistant", "content": row[kind]}
        last = end if isinstance(end, list) else [end]
        whole = last if last[:len(messages)] == messages else [*messages, *last]
        yield whole, Sample(text="", correct=kind == "chosen", finish=base.finish, meta={"preference": kind})


def speaker(message: dict[str, Any]) -> Role | None:
    """Role of a message by its `role` or `from`; None if it has none that is known."""
    name = message.get("role", message.get("from"))
    return SPEAKERS.get(name.lower()) if isinstance(name, str) else None


def chat_trace(messages: list[dict[str, Any]], sample: Sample, facts: RowFacts, style: Style) -> Trace:
    """Segments turn by turn. What follows the last written message supervises nothing and is left out, counted."""
    if not all(isinstance(m, dict) for m in messages):
        raise Reject("malformed_message", str([m for m in messages if not isinstance(m, dict)])[:40])
    written = [i for i, m in enumerate(messages) if speaker(m) in WRITTEN]
    if not written:
        raise Reject("no_assistant_turn", f"roles: {[m.get('role', m.get('from')) for m in messages]}")
    last = written[-1]
    segments: list[Segment] = []
    flags: list[str] = []
    turn = 0
    for i, message in enumerate(messages[:last + 1]):
        role = speaker(message)
        if role in WRITTEN:
            here, defects = written_turn(message, sample if i == last else Sample(text=""), style, turn)
            segments += here
            flags += defects if i == last else [f for f in defects if f == FLAG_MISSING_OPEN]
            turn += 1
        elif role is None:
            raise Reject("unknown_role", str(message.get("role", message.get("from"))))
        else:
            segments += given_turn(message, role, turn)
    if not any(s.role is QUESTION and s.text.strip() for s in segments):
        raise Reject("no_question", "no user message before the last assistant message")
    meta = {**facts.meta, **sample.meta, **({"source_correct": sample.correct} if sample.correct is not None else {})}
    if len(messages) > last + 1:
        meta["messages_dropped"] = len(messages) - last - 1
    return Trace(segments=tuple(segments), gold=facts.gold, verdict=sample.correct, flags=tuple(dict.fromkeys(flags)),
                 scores=sample.scores, meta=meta,
                 provenance=Provenance(source=facts.source, row=facts.index, teacher=sample.teacher or facts.teacher,
                                       sampling=facts.sampling))


def given_turn(message: dict[str, Any], role: Role, turn: int) -> list[Segment]:
    """Segments of a message the model did not write: its text parts, tool results among them."""
    out = []
    for kind, text in parts(message):
        if kind is THINK or kind is TOOL_CALL:
            raise Reject("unsupported_part", f"{kind.name.lower()} in a {role.name.lower()} message")
        out.append(Segment(role=TOOL if kind is TOOL else role, text=text, turn=turn))
    return out


def written_turn(message: dict[str, Any], sample: Sample, style: Style, turn: int) -> tuple[list[Segment], list[str]]:
    """Segments and flags of a message the model wrote: thinking, text, tool calls."""
    if speaker(message) is TOOL_CALL:
        return [Segment(role=TOOL_CALL, text="".join(t for _, t in parts(message)), turn=turn)], []
    pieces = list(parts(message))
    text = "".join(t for kind, t in pieces if kind is ANSWER)
    thoughts = [t for kind, t in pieces if kind is THINK]
    apart = next((message[k] for k in ("reasoning_content", "reasoning", "thinking")
                  if isinstance(message.get(k), str) and message[k]), None)
    calls = [t for kind, t in pieces if kind is TOOL_CALL] + [call_text(c) for c in called(message)]
    thinking = "\n\n".join(thoughts) if thoughts else apart
    finish = sample.finish or as_text(message.get("finish_reason") or "")
    turn_sample = Sample(text=text, thinking=thinking, finish=finish)
    if calls and not text.strip():  # a call is the answer of this turn
        segments = [Segment(role=THINK, text=thinking, turn=turn)] if thinking else []
        flags = [FLAG_TRUNCATED] if is_cut(finish) else []
    else:
        segments, flags = written_segments(turn_sample, style, turn)
        flags = [f for f in flags if not (calls and f == FLAG_EMPTY_ANSWER)]
    return segments + [Segment(role=TOOL_CALL, text=c, turn=turn) for c in calls], flags


def parts(message: dict[str, Any]) -> Iterator[tuple[Role, str]]:
    """(kind, text) of the typed parts of a message; a plain text is one ANSWER part."""
    content = message.get("content", message.get("value"))
    if not isinstance(content, list):
        if content is not None:
            yield ANSWER, as_text(content)
        return
    for part in content:
        if isinstance(part, str):
            yield ANSWER, part
            continue
        kind = PARTS.get(str(part.get("type", "text")) if isinstance(part, dict) else "")
        if kind is None:
            raise Reject("unsupported_part", str(part.get("type") if isinstance(part, dict) else part)[:40])
        keys = ("text", "value", "thinking", "reasoning", "content")
        value = next((part[k] for k in keys if part.get(k) is not None), None)
        if isinstance(value, list):  # a tool result with parts of its own
            value = "".join(as_text(v.get("text", "")) for v in value if isinstance(v, dict))
        yield kind, call_text(part) if kind is TOOL_CALL and value is None else as_text(value or "")


def last_text(messages: list[dict[str, Any]]) -> str:
    """Text of the last written message, for a look at its style."""
    written = [m for m in messages if speaker(m) is ANSWER]
    try:
        return "".join(text for kind, text in parts(written[-1]) if kind is ANSWER) if written else ""
    except Reject:
        return ""


def called(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Tool calls kept beside the content."""
    calls = message.get("tool_calls") or message.get("function_call") or []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise Reject("unsupported_part", f"tool calls {str(calls)[:40]}")
    return calls


def call_text(call: dict[str, Any]) -> str:
    """`{"name": ..., "arguments": ...}` of a tool call; arguments that came as JSON text stay as written."""
    function = call.get("function")
    body = function if isinstance(function, dict) else call
    name, arguments = body.get("name", ""), body.get("arguments", body.get("input", {}))
    if isinstance(arguments, str):
        try:
            json.loads(arguments)
        except ValueError:
            arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'


