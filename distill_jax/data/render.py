"""A `Trace` as token ids with a role on each: the one place where text becomes training rows.

The prompt is the chat template's generation prompt, exact to the token. The supervised turn is written here, because
templates delete thinking: `<think>` (unless the prompt ends with it), the thinking, `</think>`, a blank line, the
answer, and what the template ends a turn with: `<think>\\n{thinking}\\n</think>\\n\\n{answer}` always, because
importers take exactly these newlines away.
Prompt and supervised turn are encoded apart, as they are in generation. Earlier turns follow the template; they are
context, so what the assistant said there has role QUESTION.

A trace without thinking follows the template's own convention: a template with a switch for it (Qwen3) closes the
block in the prompt; other thinking templates (R1) get an empty block written by the model; plain ones get the answer.
An unterminated thinking gets no `</think>`, and a truncated trace no end token.

The role of a token is that of the text its first byte stands in. A token that begins in a segment and runs over its
end keeps its whole length in its span: `segment[span]` is what of the segment it holds.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_jax.core.roles import ANSWER, INJECTED, QUESTION, SYSTEM, THINK, TOOL, TOOL_CALL, Role
from distill_jax.data.chat import THINK_CLOSE, THINK_OPEN, Message
from distill_jax.data.conversation import Piece, Turn, parse_calls, shown, split_prompt, to_messages, turns
from distill_jax.data.rows import Chunk, assemble, from_sampled
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import Row
from distill_jax.traces.trace import FLAG_TRUNCATED, FLAG_UNTERMINATED, Segment, Trace

VERSION = 1  # raise it when rendering changes: stores compare it


@dataclass(frozen=True, kw_only=True)
class Style:
    """Choices of the supervised turn.

    think_tags   False: thinking, blank line, answer, without tags
    empty_think  an empty thinking block for traces without thinking; None: if template or vocabulary know `<think>`
    """

    think_tags: bool = True
    empty_think: bool | None = None


class _Writer:
    """Text that grows by pieces."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.pieces: list[Piece] = []
        self.size = 0

    def add(self, text: str, role: Role, part: int = -1, offset: int = 0) -> None:
        if text:
            self.pieces.append(Piece(start=self.size, role=role, part=part, offset=offset))
            self.text.append(text)
            self.size += len(text.encode("utf-8", "surrogatepass"))

    @property
    def last(self) -> str:
        return self.text[-1] if self.text else ""


def render(trace: Trace, tok: Tokenizer, *, style: Style = Style(), **template_kwargs: Any) -> Row:
    """The row of a trace. Traces that hold ids sampled with this tokenizer keep them (`Trace.encoded`).

    `trace.meta["tools"]`, a list of function schemas, goes to the template. Raises ValueError when the template
    cannot render the conversation, or when the trace has nothing to learn from.
    """
    chunks = _chunks(trace, tok, style, template_kwargs)
    if trace.encoded is not None and trace.encoded.tokenizer == tok.hash:
        return from_sampled(trace, tok, chunks)
    encoded = [tok.encode(c.text, continues=i > 0) for i, c in enumerate(chunks)]
    return assemble(trace, chunks, encoded)


def prompt_ids(source: "Trace | str | Sequence[Message]", tok: Tokenizer, *, style: Style = Style(),
               prefill: str = "", **template_kwargs: Any) -> np.ndarray:
    """int32 [P]: ids a model is given before it writes, for a trace, a question or a list of messages.

    prefill  text that the prompt is to end with (`prefilled`); a trace that holds sampled ids keeps its own prompt
    """
    if isinstance(source, Trace):
        e = source.encoded
        if e is not None and e.tokenizer == tok.hash:
            return np.asarray(e.ids[:e.prompt_length], np.int32)
        messages = turns(source)
        return tok.encode(prefilled(_prompt(source, tok, messages, style, template_kwargs)[0], prefill))[0]
    chat = [{"role": "user", "content": source}] if isinstance(source, str) else source
    return tok.encode(prefilled(tok.prompt_text(chat, **template_kwargs), prefill))[0]


def prefilled(prompt: str, text: str) -> str:
    """The prompt with `text` at its end. What it ends with of the text's beginning is not repeated, so a prompt that
    opens `<think>` is only closed by `<think>\\n\\n</think>`, and a second time changes nothing."""
    common = next(n for n in range(len(text), -1, -1) if prompt.endswith(text[:n]))
    return prompt + text[common:]


def template_id(tok: Tokenizer, *, style: Style = Style(), **template_kwargs: Any) -> str:
    """Identity of the rendering: template, its arguments, style and the version of this file."""
    extra = json.dumps([VERSION, style.think_tags, style.empty_think, template_kwargs], sort_keys=True, default=str)
    return f"{tok.chat.id}-{hashlib.blake2b(extra.encode(), digest_size=4).hexdigest()}"


def split_completion(completion: "str | Sequence[int] | np.ndarray", tok: Tokenizer, *,
                     opened: bool | None = None) -> tuple[str, str, bool]:
    """`(thinking, answer, terminated)` of what a model wrote; inverse of the supervised turn `render` writes.

    opened: whether the prompt ended with `<think>`; None: as the template's generation prompt does.
    terminated: the completion ended its turn (as ids: its last id is an end id). A thinking without `</think>` is all
    thinking and no answer.
    """
    if isinstance(completion, str):
        text, end = completion, tok.chat.turn_end
        terminated = bool(end) and text.endswith(end)
        text = text[:-len(end)] if terminated else text
    else:
        ids = [int(i) for i in completion]
        terminated = bool(ids) and ids[-1] in tok.eos_ids
        text = tok.decode(ids[:-1] if terminated else ids)
    if opened is None:
        opened = _opens(tok.prompt_text([{"role": "user", "content": "x"}]))
    body = text.lstrip()
    starts = body.startswith(THINK_OPEN)
    head, closed, answer = (body if starts else text).partition(THINK_CLOSE)
    if not (starts or opened or closed):
        return "", text, terminated
    thinking = (head[len(THINK_OPEN):] if starts else head).removeprefix("\n")
    thinking = thinking.removesuffix("\n") if closed else thinking
    return thinking, answer.removeprefix("\n").removeprefix("\n"), terminated


def _opens(prompt: str) -> bool:
    return prompt.rstrip("\n").endswith(THINK_OPEN)


def _prompt(trace: Trace, tok: Tokenizer, messages: Sequence[Turn], style: Style,
            kwargs: Mapping[str, Any]) -> tuple[str, list[Piece]]:
    n = split_prompt(messages)
    kwargs = _with_tools(trace, kwargs)
    written = [trace.segments[i].role for t in messages[n:] for i in t.parts]
    if written and THINK not in written and style.think_tags and style.empty_think is not False:
        kwargs |= tok.chat.no_think_kwargs(to_messages(trace, messages[:n]), **kwargs)
    context = {SYSTEM: SYSTEM, TOOL: TOOL}
    roles = {i: context.get(trace.segments[i].role, QUESTION) for t in messages[:n] for i in t.parts}
    return shown(trace, messages[:n], tok.chat, roles, **kwargs)


def _with_tools(trace: Trace, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    tools = trace.meta.get("tools")
    return ({"tools": tools} if tools else {}) | dict(kwargs)


def _chunks(trace: Trace, tok: Tokenizer, style: Style, kwargs: Mapping[str, Any]) -> list[Chunk]:
    """Prompt, assistant turn, tool results, assistant turn, ..."""
    messages = turns(trace)
    n = split_prompt(messages)
    if n == len(messages):
        raise ValueError(f"trace {trace.id} has no thinking, answer or tool call after its last question: nothing to "
                         f"learn from. Use prompt_ids() for a prompt alone.")
    text, pieces = _prompt(trace, tok, messages, style, kwargs)
    chunks = [Chunk(text=text, pieces=tuple(pieces))] if text else []
    kwargs = _with_tools(trace, kwargs)
    for k in range(n, len(messages)):
        if messages[k].role == "assistant":
            final = k == len(messages) - 1
            out = _assistant_turn(trace, messages[k], tok, style, before=text, final=final, kwargs=kwargs)
            chunks.append(Chunk(text="".join(out.text), pieces=tuple(out.pieces)))
        elif k + 1 == len(messages) or messages[k + 1].role == "assistant":
            text, pieces = _tool_results(trace, tok, messages, k, kwargs)
            chunks.append(Chunk(text=text, pieces=tuple(pieces)))
    return chunks


def _assistant_turn(trace: Trace, turn: Turn, tok: Tokenizer, style: Style, *, before: str, final: bool,
                    kwargs: Mapping[str, Any]) -> _Writer:
    """The supervised text of one assistant message; `before` is the prompt it stands behind."""
    out = _Writer()
    lead = tok.chat.lead
    cut = final and bool({FLAG_TRUNCATED, FLAG_UNTERMINATED} & set(trace.flags))
    blocks = _blocks(trace, turn)
    opened = style.think_tags and _opens(before)
    if blocks[0][0] != THINK:
        empty = tok.chat.thinks if style.empty_think is None else style.empty_think
        closed = before.rstrip("\n").endswith(THINK_CLOSE)
        if opened:
            out.add(f"\n{THINK_CLOSE}\n\n", THINK)
        elif empty and style.think_tags and not closed:
            out.add(f"{lead}{THINK_OPEN}\n\n{THINK_CLOSE}\n\n", THINK)
    for n, (role, parts) in enumerate(blocks):
        if role == THINK and style.think_tags:
            tag = "" if n == 0 and opened else (lead if not out.text else "") + THINK_OPEN
            out.add(tag + ("" if n == 0 and opened and before.endswith("\n") else "\n"), THINK)
        elif not out.text:
            out.add(lead, role)
        if role == TOOL_CALL:
            _tool_calls(trace, parts, tok, out, kwargs)
        else:
            for i in parts:
                out.add(trace.segments[i].text, trace.segments[i].role, i)
        last = n == len(blocks) - 1
        if role == THINK and not (last and FLAG_UNTERMINATED in trace.flags):
            out.add(f"\n{THINK_CLOSE}\n\n" if style.think_tags else "\n\n", THINK)
    out.add("" if cut else tok.chat.turn_end, ANSWER)
    return out


def _blocks(trace: Trace, turn: Turn) -> list[tuple[Role, list[int]]]:
    """Runs of one role within a message. Injected text belongs to the run it stands in, or else to the next one."""
    out: list[tuple[Role, list[int]]] = []
    waiting: list[int] = []
    for i in turn.parts:
        role = trace.segments[i].role
        if role == INJECTED:
            (out[-1][1] if out else waiting).append(i)
        elif out and out[-1][0] == role:
            out[-1][1].append(i)
        else:
            out.append((role, [*waiting, i]))
            waiting = []
    return out or [(ANSWER, waiting)]


def _tool_calls(trace: Trace, parts: Sequence[int], tok: Tokenizer, out: _Writer, kwargs: Mapping[str, Any]) -> None:
    """Tool calls as the template writes them; segments that are not JSON calls stand as they are."""
    segments: list[tuple[int, Segment]] = [(i, trace.segments[i]) for i in parts]
    calls = [c for _, s in segments for c in parse_calls(s.text)]
    if not calls or not all(parse_calls(s.text) for _, s in segments if s.role == TOOL_CALL):
        for i, s in segments:
            out.add(s.text, s.role, i)
        return
    block = _call_block(tok, calls, bool("".join(out.text).strip()), kwargs)
    if not all(c["function"]["name"] in block for c in calls):  # a template without tools
        for i, s in segments:
            out.add(s.text, s.role, i)
        return
    block = block.lstrip("\n") if not out.text or out.last.endswith("\n") else block
    at = 0
    for i, s in segments:
        where = block.find(s.text, at)
        if where >= 0:
            out.add(block[at:where], TOOL_CALL)
            out.add(s.text, TOOL_CALL, i)
            at = where + len(s.text)
    out.add(block[at:], TOOL_CALL)


def _call_block(tok: Tokenizer, calls: Sequence[Mapping[str, Any]], follows: bool, kwargs: Mapping[str, Any]) -> str:
    """What the template writes for these calls, between the assistant's text and the end of its turn."""
    ask = [{"role": "user", "content": "x"}]
    mark = "\ue000" if follows else ""
    ids = [{"id": f"{n:09d}", **c} for n, c in enumerate(calls)]
    full = tok.render([*ask, {"role": "assistant", "content": mark, "tool_calls": ids}], generation_prompt=False,
                      **kwargs)
    prompt = tok.render(ask, generation_prompt=True, **kwargs)
    if mark and mark in full:
        tail = full.rpartition(mark)[2]
    else:
        tail = full[len(prompt):] if full.startswith(prompt) else full[full.rfind("x") + 1:]
    tail = tail[tail.find(THINK_CLOSE) + len(THINK_CLOSE):].lstrip("\n") if THINK_CLOSE in tail else tail
    end = tail.rfind(tok.chat.turn_end) if tok.chat.turn_end else -1
    return tail[:end] if end >= 0 else tail.rstrip("\n")


def _tool_results(trace: Trace, tok: Tokenizer, messages: Sequence[Turn], k: int,
                  kwargs: Mapping[str, Any]) -> tuple[str, list[Piece]]:
    """Tool results up to message k as the template shows them, with the generation prompt behind them: what stands
    between the end token of one assistant turn and the next one."""
    roles = {i: {SYSTEM: SYSTEM, TOOL: TOOL}.get(trace.segments[i].role, QUESTION)
             for t in messages for i in t.parts}
    text, pieces = shown(trace, messages[:k + 1], tok.chat, roles, **kwargs)
    first = k
    while messages[first - 1].role == "tool":
        first -= 1
    results = [p for p in pieces if p.role == TOOL][first - k - 1:]
    raw = text.encode("utf-8", "surrogatepass")
    end = tok.chat.turn_end.encode()
    at = raw.rfind(end, 0, results[0].start) if results and end else -1
    if at < 0:
        shown_text = trace.segments[messages[first].parts[0]].text[:60]
        raise ValueError(f"the chat template does not show the tool result {shown_text!r} of trace {trace.id}: use a "
                         f"template that knows tools (chat_template=)")
    cut = at + len(end)
    inside = [p for p in pieces if p.start > cut]
    head = max((p for p in pieces if p.start <= cut), key=lambda p: p.start)
    within = cut - head.start if head.part >= 0 else 0
    head = Piece(start=cut, role=head.role, part=head.part, offset=head.offset + within)
    moved = [Piece(start=p.start - cut, role=p.role, part=p.part, offset=p.offset) for p in [head, *inside]]
    return raw[cut:].decode("utf-8", "surrogatepass"), moved
