"""Chat templates: what a conversation looks like as text, and what can be read off a template.

Templates are Hugging Face Jinja templates, rendered by transformers. Tokenizers without one get a built-in template
from the folder `templates/` beside this file: `plain`, `mistral_v1`, `mistral_v3`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Message = Mapping[str, Any]

BUILTIN = Path(__file__).parent / "templates"
MARK = "\ue000"  # private use: no template looks for it
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def builtin_template(name: str) -> str:
    """Text of a template of the folder `templates/`. Raises ValueError listing the known ones."""
    path = BUILTIN / f"{name}.jinja"
    if not path.is_file():
        known = sorted(p.stem for p in BUILTIN.glob("*.jinja"))
        raise ValueError(f"no chat template {name!r}: it is neither a file nor one of the built-in {known}")
    return path.read_text()


def read_template(source: str | Path) -> str:
    """A template from a file or by built-in name."""
    path = Path(source)
    return path.read_text() if path.is_file() else builtin_template(str(source))


def _parsed(text: Any) -> dict[str, Any] | None:
    """`{"value": ...}` of JSON text; None when it is none."""
    try:
        return {"value": json.loads(text)}
    except (TypeError, ValueError):
        return None


def _plain(message: Message, arguments_as_text: bool) -> dict[str, Any]:
    """A copy a template can read: arguments of tool calls as an object (or as JSON text), results that are JSON also
    parsed (`json.value`, for the built-in templates), and a content that is never missing."""
    out = dict(message)
    if out.get("role") == "tool" and (parsed := _parsed(out.get("content"))):
        out["json"] = parsed
    if out.get("tool_calls"):
        out["tool_calls"] = [_plain_call(c, arguments_as_text) for c in out["tool_calls"]]
        out["content"] = out.get("content") or ""
    else:
        out.pop("tool_calls", None)  # several templates test only whether the key is there
    return out


def _plain_call(call: Mapping[str, Any], arguments_as_text: bool) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str) and (parsed := _parsed(arguments)):
        arguments = parsed["value"]
    if arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function"} | {k: v for k, v in call.items() if k != "function"} | {
        "function": {"name": function.get("name", ""), "arguments": arguments}}


class ChatTemplate:
    """A template with the special tokens it may name.

    text       Jinja source
    variables  `bos_token`, `eos_token`, ... as given to the template
    specials   contents of the tokenizer's special and added tokens: where a turn ends is read off these
    """

    def __init__(self, text: str, variables: Mapping[str, str], specials: Sequence[str]) -> None:
        self.text = text
        self.variables = dict(variables)
        self.specials = tuple(s for s in specials if s)

    @cached_property
    def id(self) -> str:
        """Hash of the template and its variables: equal ids render equal text."""
        body = json.dumps([self.text, sorted(self.variables.items())])
        return hashlib.blake2b(body.encode(), digest_size=8).hexdigest()

    def render(self, messages: Sequence[Message], *, generation_prompt: bool, tools: Any = None,
               **kwargs: Any) -> str:
        """The conversation as text. Raises ValueError with the template's own complaint.

        Templates that print today's date get their documented default date, so that rendering is a pure function;
        pass `date_string=` for another one.
        """
        if "strftime_now" in self.text and "date_string" in self.text:
            kwargs = {"date_string": "26 Jul 2024"} | kwargs
        calls = any(m.get("tool_calls") for m in messages)
        error: Exception | None = None
        for as_text in (False, True) if calls else (False,):  # templates differ in whether arguments are JSON text
            chat = [_plain(m, as_text) for m in messages]
            try:
                out, _ = render_jinja_template(
                    [chat], tools=tools or None, chat_template=self.text, add_generation_prompt=generation_prompt,
                    **{**self.variables, **kwargs})
                return out[0]
            except Exception as e:  # jinja raises many kinds, and so does the Python inside a template
                error = error or e
        roles = [m.get("role") for m in messages]
        raise ValueError(f"the chat template cannot render a conversation of roles {roles}: {error}") from None

    @cached_property
    def _tail(self) -> tuple[str, str]:
        """(what the template writes between its generation prompt and an answer, what it writes after the answer)."""
        ask = [{"role": "user", "content": "x"}]
        prompt = self.render(ask, generation_prompt=True)
        full = self.render([*ask, {"role": "assistant", "content": MARK}], generation_prompt=False)
        head, _, tail = full.rpartition(MARK)
        lead = head[len(prompt):] if head.startswith(prompt) else ""
        return ("" if lead.strip() else lead), tail

    @property
    def lead(self) -> str:
        """White space the template puts between the generation prompt and the assistant's text."""
        return self._tail[0]

    @cached_property
    def turn_end(self) -> str:
        """What ends an assistant turn: `<|im_end|>`, `</s>`, ...; empty if neither template nor tokenizer ends it."""
        tail = self._tail[1]
        found = [(tail.find(s), -len(s), s) for s in self.specials if s in tail]
        if not found:
            return self.variables.get("eos_token", "")
        at, _, special = min(found)
        return tail[:at] + special

    @cached_property
    def thinks(self) -> bool:
        """Whether the template or the vocabulary knows `<think>`: such models always write a thinking block."""
        return any(THINK_CLOSE in s for s in (self.text, *self.specials))

    def no_think_kwargs(self, messages: Sequence[Message], **kwargs: Any) -> dict[str, Any]:
        """Arguments under which the template's prompt closes the thinking itself (Qwen3); empty if it cannot."""
        if "enable_thinking" not in self.text:
            return {}
        prompt = self.render(messages, generation_prompt=True, **(kwargs | {"enable_thinking": False}))
        return {"enable_thinking": False} if prompt.rstrip("\n").endswith(THINK_CLOSE) else {}
