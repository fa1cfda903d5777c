"""Text of a response into thinking and answer, without losing a character that matters.

The rule on white space, everywhere in the package: a thinking block is rendered as

    <think>\\n{thinking}\\n</think>\\n\\n{answer}

and the renderer adds those newlines where the text does not have them. So an importer takes away the one newline after
the opening tag, the one before the closing tag and the one or two before the answer. Where a teacher wrote more of
them, all stay in the text. Nothing else is touched: rendering gives back every turn that had the newlines at all.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from distill_jax.traces.trace import FLAG_EMPTY_ANSWER, FLAG_MISSING_OPEN, FLAG_UNTERMINATED


class Reject(Exception):
    """This row or sample gives no trace. `reason` is a short code (it is counted), `detail` says what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, kw_only=True)
class Tags:
    """A pair of marks around the thinking and, for some teachers, a pair around the answer."""

    open: str
    close: str
    answer_open: str = ""
    answer_close: str = ""


TAGS = (
    Tags(open="<think>", close="</think>"),
    Tags(open="<thinking>", close="</thinking>"),
    Tags(open="<Thought>", close="</Thought>", answer_open="<Output>", answer_close="</Output>"),
    Tags(open="<|begin_of_thought|>", close="<|end_of_thought|>",
         answer_open="<|begin_of_solution|>", answer_close="<|end_of_solution|>"),
    Tags(open="[THINK]", close="[/THINK]"),
    Tags(open="<reasoning>", close="</reasoning>"),
    Tags(open="<thought>", close="</thought>", answer_open="<output>", answer_close="</output>"),
    Tags(open="<Think>", close="</Think>"),
    Tags(open="<seed:think>", close="</seed:think>"),
    Tags(open="◁think▷", close="◁/think▷"),
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """`thinking` is None where the response has none; `answer` is None where the thinking never ended."""

    thinking: str | None
    answer: str | None
    flags: tuple[str, ...] = ()


def split_response(text: str, prompt_opens: bool = False) -> Split:
    """Thinking, answer and flags of a response with the thinking inside. Raises Reject.

    The first closing tag ends the thinking; whatever follows is the answer, verbatim. `prompt_opens`: in this file
    the prompt ends with the opening tag, so a response without any tag is thinking that never ended.
    """
    tags = next((t for t in TAGS if text.lstrip().startswith(t.open)), None)
    if tags is not None:
        body = text.lstrip()[len(tags.open):]
        flags: tuple[str, ...] = ()
    else:
        tags = next((t for t in TAGS if t.close in text), None)
        if tags is None and not prompt_opens:
            return Split(thinking=None, answer=text, flags=() if text.strip() else (FLAG_EMPTY_ANSWER,))
        tags = tags or TAGS[0]
        body, flags = text, (FLAG_MISSING_OPEN,)
        if tags.open in text.partition(tags.close)[0]:
            raise Reject("text_before_think", text[:80])
    thinking, close, rest = body.partition(tags.close)
    if not close:
        return Split(thinking=strip_thinking(body), answer=None,
                     flags=(*flags, FLAG_UNTERMINATED, FLAG_EMPTY_ANSWER))
    answer = unwrap(rest, tags)
    return Split(thinking=strip_thinking(thinking), answer=answer,
                 flags=flags if answer.strip() else (*flags, FLAG_EMPTY_ANSWER))


def strip_thinking(text: str) -> str:
    """Without the newline after the opening and the one before the closing tag; longer runs of newlines stay."""
    if len(text) <= 2 and not text.strip("\n"):
        return ""
    text = text if text.startswith("\n\n") else text.removeprefix("\n")
    return text if text.endswith("\n\n") else text.removesuffix("\n")


def strip_answer(text: str) -> str:
    """Without the one or two newlines after the closing tag; a longer run stays."""
    return text if text.startswith("\n\n\n") else text.lstrip("\n")


def unwrap(rest: str, tags: Tags) -> str:
    """The answer without its own marks, where this teacher puts them (a missing closing one is a stop string)."""
    if not tags.answer_open or not rest.lstrip().startswith(tags.answer_open):
        return strip_answer(rest)
    inner = rest.lstrip()[len(tags.answer_open):]
    return inner.partition(tags.answer_close)[0].removeprefix("\n").removesuffix("\n")


def has_close(text: str) -> bool:
    return any(t.close in text for t in TAGS)


def lacks_open(text: str) -> bool:
    """Whether the thinking ends but does not begin here: the opening tag was in the prompt."""
    tags = next((t for t in TAGS if t.close in text), None)
    return tags is not None and tags.open not in text.partition(tags.close)[0]


def opens(text: str) -> bool:
    return any(text.lstrip().startswith(t.open) for t in TAGS)


_FINAL = re.compile(  # the last line `#### 18` or `A: 18`, or a closing sentence `The answer is 18`
    r"(?:^|\n)(?P<mark>#{2,4}[ \t]*[^\n]+|A: [^\n]+)\s*\Z"
    r"|(?P<says>(?:The|\bthe) (?:final )?answer is:? [^\n]{1,200})\s*\Z")
_TAIL = 600  # a final line is looked for in the last characters only, so that megabytes cost nothing


def split_rationale(text: str) -> tuple[str, str] | None:
    """`rationale ... #### 18` (or `A: 18`, or `... The answer is 18`) -> (rationale, final line), else None.

    White space between the two is dropped; both sides are otherwise verbatim.
    """
    start = max(0, len(text) - _TAIL)
    found = _FINAL.search(text, start)
    if found is None:
        return None
    if found["says"] is not None:  # of several such sentences the last one is the final line
        at = max(text.rfind("he answer is", start), text.rfind("he final answer is", start)) - 1
    else:
        at = found.start("mark")
    return text[:at].rstrip(), text[at:]


def final_answer(text: str) -> str | None:
    """What a reference solution ends with: after `####` or `A:`, in the last box, or after "the answer is"."""
    split = split_rationale(text)
    if split is not None and split[1][0] in "#A":
        return split[1].lstrip("#").removeprefix("A:").strip() or None
    boxed = all_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    if split is not None:
        return split[1].partition("answer is")[2].lstrip(": ").strip().removesuffix(".") or None
    return None


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` (or `\\fbox{...}`, or `\\boxed 5`) that holds something, or None.

    Braces are balanced, escaped ones skipped; a box that is never closed (a cut text) does not count. The scan is
    bounded: the last 8 boxes of at most 20,000 characters.
    """
    end = len(text)
    for _ in range(8):
        at = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if at < 0:
            return None
        rest = text[at:at + 20_000].partition("box")[2].removeprefix("ed").lstrip()
        if rest.startswith("{"):
            inner = _balanced(rest)
        else:
            inner = next(iter(rest.split("$")[0].split()), None)
        if inner is not None and inner.strip():
            return inner
        end = at
    return None


_BETWEEN = re.compile(  # what may stand between the boxes of one answer: `$x = \\boxed{3}$ or $x = \\boxed{-2}$`
    r"(?=[^a-z]*(?:[,;、和或]|and|or))[\s$,;.&\\()\[\]]*(?:\\text\{)?(?:and|or|和|或|、)?\}?[\s$\\(\[]*(?:[a-z](?:_\{?[0-9]\}?)?\s*=\s*)?")


def all_boxed(text: str) -> str | None:
    """Contents of the boxes of one answer, joined by commas: those before the last one that only `and` or a comma
    separates from it. None where there is none."""
    last = last_boxed(text)
    parts: list[str] = []
    end = len(text)
    while last is not None and len(parts) < 8 and (at := text.rfind("\\boxed{", 0, end)) >= 0:
        inner = _balanced(text[at + 6:at + 20_000])
        if inner is None or not inner.strip():
            break
        if parts and not _BETWEEN.fullmatch(text[at + 8 + len(inner):end][:60]):
            break
        parts.insert(0, inner)
        end = at
    return ", ".join(parts) if len(parts) > 1 else last


def _balanced(text: str) -> str | None:
    """Inside of the braces that `text` starts with."""
    depth, i = 0, 0
    while i < len(text):
        c = text[i]
        if c == "\\":
            i += 2
            continue
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[1:i]
        i += 1
    return None


_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_REASONING, _ANSWER = ("reasoning", "thinking", "explanation"), ("answer", "final_answer", "solution")
_BAD_ESCAPE = re.compile(  # LaTeX that was not escaped: `\(`, or a command whose first letter is a JSON escape
    r"(?<!\\)\\(?=[^\\\"/bfnrtu]|(?:frac|beta|bar|big|boxed|times|text|theta|tan|to|neq|ne|nu|right|rho)\b)")


def is_json_response(text: str) -> bool:
    """Whether a response looks like an object `{"reasoning": ..., "answer": ...}`, fenced or bare."""
    body = _unfence(text)
    return body.startswith("{") and any(f'"{k}"' in body[:200] for k in _REASONING)


def unwrap_json(text: str) -> tuple[str | None, str]:
    """(reasoning, answer) of a response that is such an object. Raises Reject where it is broken beyond LaTeX
    backslashes that were not escaped."""
    body = _unfence(text)
    for attempt in (body, _BAD_ESCAPE.sub(r"\\\\", body)):
        try:
            value = json.loads(attempt, strict=False)
        except (ValueError, RecursionError):
            continue
        thinking = next((value[k] for k in _REASONING if k in value), None) if isinstance(value, dict) else None
        answer = next((value[k] for k in _ANSWER if k in value), None) if isinstance(value, dict) else None
        if answer is not None and isinstance(thinking, str | None):
            return thinking, as_text(answer)
    raise Reject("broken_json_response", body[:80])


def _unfence(text: str) -> str:
    fenced = _FENCE.match(text)
    return (fenced[1] if fenced else text).strip()


def as_text(value: Any) -> str:
    """A JSON value as the text a person would write: 27.0 -> "27", True -> "True", a list of strings by lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(x, str) for x in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False)
