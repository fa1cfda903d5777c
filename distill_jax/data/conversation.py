"""A `Trace` as the messages a chat template takes, and back to where each segment stands in the rendered text."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distill_jax.core.roles import ANSWER, INJECTED, QUESTION, SYSTEM, THINK, TOOL, TOOL_CALL, Role
from distill_jax.data.chat import ChatTemplate
from distill_jax.traces.trace import Segment, Trace

CHAT_ROLE = {SYSTEM: "system", QUESTION: "user", TOOL: "tool"} | dict.fromkeys(
    (THINK, ANSWER, TOOL_CALL, INJECTED), "assistant")

_OPEN, _CLOSE = 0xF0000, 0x100000  # private-use planes: marks around segment i are chr(_OPEN + i), chr(_CLOSE + i)
_MARKS = re.compile("[\U000f0000-\U0010ffff]")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message: chat role and the indices of the trace's segments it is made of."""

    role: str
    parts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of rendered text. start: byte position in the row's text; part: index of the segment it shows, from byte
    `offset` of that segment on, or -1 for text of the template."""

    start: int
    role: Role
    part: int = -1
    offset: int = 0


def turns(trace: Trace) -> list[Turn]:
    """Messages of a trace: neighbouring segments of one chat role and turn (assistant: of any turn); every tool
    result is its own."""
    out: list[Turn] = []
    for i, s in enumerate(trace.segments):
        role = CHAT_ROLE.get(s.role)
        if role is None:
            raise ValueError(f"segment {i} of trace {trace.id} has role {s.role.name}; a trace is made of "
                             f"{sorted(r.name for r in CHAT_ROLE)}")
        last = out[-1] if out else None
        same_turn = last is not None and trace.segments[last.parts[-1]].turn == s.turn
        if last and last.role == role and role != "tool" and (same_turn or role == "assistant"):
            out[-1] = Turn(role=role, parts=(*last.parts, i))
        else:
            out.append(Turn(role=role, parts=(i,)))
    return out


def split_prompt(messages: Sequence[Turn]) -> int:
    """Number of messages that are prompt: everything up to the last question; what follows is the supervised turn,
    with its tool calls and their results."""
    return max((i + 1 for i, t in enumerate(messages) if t.role in ("user", "system")), default=0)


def parse_calls(text: str) -> list[dict[str, Any]]:
    """Tool calls in a segment's text: a JSON object with `name` and `arguments`, or a list of them; [] otherwise."""
    try:
        value = json.loads(text)
    except ValueError:
        return []
    items = value if isinstance(value, list) else [value]
    calls = []
    for item in items:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        arguments = function.get("arguments", function.get("parameters", {}))
        calls.append({"function": {"name": function["name"], "arguments": arguments}})
    return calls


def to_messages(trace: Trace, turns_: Sequence[Turn], marked: bool = False) -> list[dict[str, Any]]:
    """Messages for the template. `marked`: every segment's text (inside its outer white space) between its marks."""
    show = _marked if marked else lambda i, s: s.text
    out: list[dict[str, Any]] = []
    pending: list[tuple[str, str]] = []  # (id, name) of calls that wait for their result
    for turn in turns_:
        segments = [(i, trace.segments[i]) for i in turn.parts]
        if turn.role == "assistant":
            message = _assistant(segments, show)
            for n, call in enumerate(message.get("tool_calls", [])):
                call["id"] = f"{len(out) * 100 + n:09d}"  # nine characters: what Mistral's templates ask for
            pending += [(c["id"], c["function"]["name"]) for c in message.get("tool_calls", [])]
            out.append(message)
        elif turn.role == "tool":
            call_id, name = pending.pop(0) if pending else ("000000000", "tool")
            out.append({"role": "tool", "content": show(*segments[0]), "tool_call_id": call_id, "name": name})
        else:
            out.append({"role": turn.role, "content": "".join(show(i, s) for i, s in segments)})
    return out


def _assistant(segments: Sequence[tuple[int, Segment]], show: Any) -> dict[str, Any]:
    thinking, content, calls = [], [], []
    seen = None
    for i, s in segments:
        role = (seen or THINK) if s.role == INJECTED else s.role
        seen = role
        if role == TOOL_CALL and (parsed := parse_calls(s.text)):
            calls += parsed
        else:
            (thinking if role == THINK else content).append(show(i, s))
    out: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
    if thinking:
        out["reasoning_content"] = "".join(thinking)
    return out | ({"tool_calls": calls} if calls else {})


def _marked(i: int, s: Segment) -> str:
    core = s.text.strip()
    if not core:
        return s.text
    lead = s.text[:len(s.text) - len(s.text.lstrip())]
    return f"{lead}{chr(_OPEN + i)}{core}{chr(_CLOSE + i)}{s.text[len(lead) + len(core):]}"


def shown(trace: Trace, turns_: Sequence[Turn], chat: ChatTemplate, roles: dict[int, Role],
          **kwargs: Any) -> tuple[str, list[Piece]]:
    """The generation prompt after these messages, and its pieces in order. Segments the template leaves out have
    none; a segment it rewrites (JSON quoting) counts as the template's text, with the segment's role.

    `roles[i]` is the role segment i gets here.
    """
    if not turns_:
        text = chat.variables.get("bos_token", "")
        return text, [Piece(start=0, role=Role.TEMPLATE)] if text else []
    text = chat.render(to_messages(trace, turns_), generation_prompt=True, **kwargs)
    marked = chat.render(to_messages(trace, turns_, marked=True), generation_prompt=True, **kwargs)
    indices = [i for t in turns_ for i in t.parts]
    if _MARKS.sub("", marked) == text:
        found = list(_from_marks(trace, marked))
    else:  # the template looked into a text, or wrote it in another form
        found = list(_by_search(trace, text, indices))
    raw = text.encode("utf-8", "surrogatepass")
    return text, _pieces(found, len(raw), roles)


def _from_marks(trace: Trace, marked: str) -> Iterator[tuple[int, int, int, int]]:
    """`(start, end, part, offset)` in bytes of the text without marks."""
    clean = _MARKS.sub("", marked).encode("utf-8", "surrogatepass")
    at = seen = 0
    opened: dict[int, int] = {}
    for mark in _MARKS.finditer(marked):
        at += len(marked[seen:mark.start()].encode("utf-8", "surrogatepass"))
        seen = mark.end()
        code = ord(mark[0])
        if code < _CLOSE:
            opened[code - _OPEN] = at
            continue
        part = code - _CLOSE
        if part not in opened:
            continue
        text, start, end = trace.segments[part].text, opened.pop(part), at
        lead = text[:len(text) - len(text.lstrip())].encode()
        trail = text[len(text.rstrip()):].encode()
        kept = bool(lead) and clean.endswith(lead, 0, start)
        end += len(trail) if trail and clean.startswith(trail, at) else 0
        yield (start - len(lead), end, part, 0) if kept else (start, end, part, len(lead))


def _by_search(trace: Trace, text: str, indices: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    raw, cursor = text.encode("utf-8", "surrogatepass"), 0
    for i in indices:
        body = trace.segments[i].text
        core = body.strip()
        lead = len(body[:len(body) - len(body.lstrip())].encode()) if core else 0
        quoted = json.dumps(core, ensure_ascii=False)[1:-1]
        for needle, part, offset in ((body, i, 0), (core, i, lead), (quoted, -1 - i, 0)):
            at = raw.find(needle.encode("utf-8", "surrogatepass"), cursor) if needle else -1
            if at >= 0:
                cursor = at + len(needle.encode("utf-8", "surrogatepass"))
                yield at, cursor, part, offset
                break


def _pieces(found: Sequence[tuple[int, int, int, int]], total: int, roles: dict[int, Role]) -> list[Piece]:
    """Pieces that cover [0, total): the found ones, and template text between them. A part below -1 is a rewritten
    segment (-1 - part)."""
    out, at = [], 0
    for start, end, part, offset in sorted(found):
        if start > at:
            out.append(Piece(start=at, role=Role.TEMPLATE))
        role = roles[part if part >= 0 else -1 - part]
        if end > start:
            out.append(Piece(start=start, role=role, part=max(part, -1), offset=offset if part >= 0 else 0))
        at = end
    if at < total:
        out.append(Piece(start=at, role=Role.TEMPLATE))
    return out
