"""Finding the final answer in a completion, and putting answers into a form in which equal ones are equal.

Pure Python and linear in the length of the text: a completion of megabytes costs milliseconds, and nothing here can
hang. What needs algebra is left to `rewards.check`.
"""

import re
from fractions import Fraction
from typing import Literal

from distill_jax.traces.formats.text import TAGS, all_boxed, last_boxed

Kind = Literal["auto", "number", "letter", "bool", "math", "text", "contains"]
"""What an answer is. `auto`: told from the gold; `contains`: the gold occurs in the answer (open questions)."""

TAIL = 4_000  # characters of the answer in which a final statement is looked for
LONGEST = 1_000  # characters; anything longer is no final answer


def after_thinking(text: str) -> str | None:
    """The text after the thinking block; None if the thinking never ends, the whole text if there is none."""
    ends = [(text.rfind(t.close) + len(t.close)) for t in TAGS if t.close in text]
    if ends:
        return text[max(ends):]
    return None if any(text.lstrip().startswith(t.open) for t in TAGS) else text


def extract(text: str, kind: Kind = "auto") -> str | None:
    """The final answer of a completion, None if it states none or its thinking never ends.

    Looked for in this order, each time the last one: `<answer>` tag, `\\boxed{}`, `####`, "the answer is" or
    "Answer:", then what the kind allows: the last number, letter, yes/no or formula; the last line of a text.
    """
    body = after_thinking(text)
    if body is None:
        return None
    body = body.translate(_WIDE).replace("\f", "\\f").replace("\b", "\\b")  # see `_PLAIN`
    for find in (_tagged, lambda b: _boxed(b, kind), lambda b: _marked(b, kind), lambda b: _stated(b, kind),
                 lambda b: _last(b, kind)):
        found = find(body)
        if found is not None and found.strip():
            return found.strip() if len(found) <= LONGEST else None
    return None


def _tagged(body: str) -> str | None:
    """Inside of the last `<answer>` (or `<Output>`); its end may be missing, being a stop string."""
    at = max(body.rfind("<answer>"), body.rfind("<Output>"))
    if at < 0:
        return None
    inner = body[body.index(">", at) + 1:].partition("</")[0].strip()
    return last_boxed(inner) or inner


def _boxed(body: str, kind: Kind) -> str | None:
    """Content of the last box; where a formula is asked for, of all boxes of the last answer."""
    return all_boxed(body) if kind == "math" else last_boxed(body)


_MARKED = re.compile(r"^(?:#{4} ?|A: )([^\n]+)$", re.MULTILINE)  # GSM8K, and its rendering in model solutions


def _marked(body: str, kind: Kind) -> str | None:
    """The last line `#### 18` or `A: 18`; where letters are asked for, `A:` is one."""
    found = _MARKED.findall(body[-TAIL:]) if kind != "letter" else []
    return found[-1] if found else None


_STATED = re.compile(
    r"(?:\banswer|\b(?:correct|right|best) (?:option|choice))\b(?: (?:to|for|of) [^.\n:]{1,80}?)?"
    r"[*_\s]{0,4}(?::|=|\bis\b|\bare\b|\bwould be\b|\bmust be\b)[*_: ]{0,4}"
    r"(?=(?P<rest>[^\n]*)(?:\n\s*(?P<next>[^\n]+))?)",
    re.IGNORECASE)


_STATED_ZH = re.compile(
    r"(?:答案|正确选项|最终结果)(?:应该|应当|应|就)?(?:是|为)?\s*[:：]?[*\s]*(?=(?P<rest>[^\n。]*)(?:\n\s*(?P<next>[^\n。]+))?)"
    r"|(?:故|应|所以|因此|因而|于是)?选(?:择)?\s*[:：]?\s*(?=(?P<choice>[（(]?[A-J](?![A-Za-z])))")


def _stated(body: str, kind: Kind) -> str | None:
    """What follows the last "answer is" or "Answer:" that states something of this kind."""
    for found in reversed(list(_STATED_ZH.finditer(body[-TAIL:]))):
        said = found["choice"] or (found["rest"] or "").strip(" *_$") or found["next"] or ""
        value = _of_kind(said, kind) if kind == "letter" or found["choice"] is None else None
        if value is not None:
            return value
    for found in reversed(list(_STATED.finditer(body[-TAIL:]))):
        said = found["rest"] if found["rest"].strip(" *_$") else found["next"] or ""
        value = _of_kind(said, kind)
        if value is not None:
            return value
    return None


def _of_kind(said: str, kind: Kind) -> str | None:
    """The answer at the beginning of a statement, None if there is none of this kind."""
    said = said.strip().strip("*_").strip()
    if kind == "letter":
        found = _LETTER_FIRST.match(said)
        return found[1] if found else None
    if kind == "bool":
        found = _BOOL.search(said[:40])
        return found[0] if found else None
    formula = _FORMULA.search(said)
    inner = next(g for g in formula.groups() if g is not None) if formula is not None else None
    said = re.split(r"\.\s+(?=[A-Z])|\.$", said)[0].strip(" *_`")
    if kind == "number":
        if number(said) is not None:
            return said
        if inner is not None and number(inner) is not None:
            return inner
        found = _NUMBER.search(plain(said.rpartition("=")[2])) or _NUMBER.search(plain(said))
        return found[0] if found else inner
    if inner is not None and kind in ("auto", "math"):
        return inner
    return said or None


_NUMBER = re.compile(
    r"-?\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|"
    r"(?<![a-zA-Z0-9_.])[-+]?(?:\$|\\\$)?[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))"
    r"(?:[eE][-+]?[0-9]{1,3})?(?:\s?/\s?[0-9]+)?\s?\\?%?")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_LETTER_FIRST = re.compile(
    r"(?:(?:option|choice|answer)\s+)?[\s(（$*\\\"'`]*(?:text\{|textbf\{|mathrm\{|boxed\{)*\(?([A-J])\)?(?![a-zA-Z0-9_'])")
_LETTER_LAST = re.compile(
    r"(?<![a-zA-Z0-9_])[(（]?([A-J])[)）]|^[ \t*]*([A-J])[ \t*]*[.:]?[ \t*]*$|\b(?i:option|choice) ([A-J])\b"
    r"|\b(?i:so|choose|pick|select) ([A-J])(?=[.!*]*[ \t]*$)", re.MULTILINE)
_BOOL = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)


def _last(body: str, kind: Kind) -> str | None:
    """Where nothing is stated: the text itself if it is but an answer, else the last number, letter, yes/no, formula
    or line."""
    tail = body[-TAIL:]
    if kind == "letter":
        found = _LETTER_LAST.findall(tail)
        if not found and len(body) <= 200:  # a bare choice with its text: `A: Rodrigo`
            found = re.findall(r"\A\s*([A-J])[:.)]", body)
        return max(found[-1]) if found else None
    lines = [line for line in tail.splitlines() if line.strip()]
    if kind == "bool":
        words = _BOOL.findall(lines[-1]) if lines else []
        return words[-1] if words else None
    if kind == "number" and number(body.strip()) is not None:
        return body
    if kind in ("number", "math", "auto") and lines:
        return _last_value(tail, kind) if _WORD.search(body[:200]) or len(lines) > 1 else lines[0]
    return lines[-1].strip().strip("*_`") if lines else None


_WORD = re.compile(r"(?<!\\)\b(?!or\b|and\b|pi\b|sqrt|sin|cos|tan|log|ln\b|infty)[A-Za-z]{2,}")


def _last_value(tail: str, kind: Kind) -> str | None:
    """The last formula or the last number of a text, whichever ends later; an equation states its right side. Where a
    formula is asked for, one is preferred; one without dollar signs is what follows the last `=`."""
    tail = plain(tail)
    bare = tail.rstrip().splitlines()[-1].rpartition("=")[2].strip(" .*_`")
    if kind == "math" and bare != tail.strip(" .*_`") and 0 < len(bare) <= 100 and not re.search(
            r"\\[)\]]|\$|(?<![\\a-zA-Z])[a-zA-Z]{3,}", bare):
        return bare
    formula = max(_FORMULA.finditer(tail), key=lambda m: m.end(), default=None)
    value = max(_NUMBER.finditer(tail), key=lambda m: m.end(), default=None)
    if formula is not None and (kind != "number" or value is None or value.end() <= formula.end()):
        inner = next(g for g in formula.groups() if g is not None)
        return inner.rpartition("=")[2] if kind == "number" else inner
    return value[0] if value is not None else None


_WIDE = str.maketrans({
    **{chr(0xFF10 + d): str(d) for d in range(10)}, **{chr(0xFF21 + d): chr(65 + d) for d in range(26)},
    **{chr(0xFF41 + d): chr(97 + d) for d in range(26)},
})
"""Full-width digits and letters: the same signs in another font."""

_PLAIN = str.maketrans({
    "−": "-", "–": "-", "‐": "-", "﹣": "-", "－": "-", "＋": "+", "⁄": "/", "∕": "/", "÷": "/", "×": "*", "·": "*",
    "⋅": "*", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "’": "'", "‘": "'", "“": '"', "”": '"', "％": "%",
    "，": ",", "．": ".", "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8",
    "²": "^{2}", "³": "^{3}", "√": "\\sqrt ", "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ",
    "∪": "\\cup ", "∩": "\\cap ", "°": "^\\circ ", "∈": "\\in ", "ℝ": "\\mathbb{R}", "≠": "\\ne ",
    "∅": "\\emptyset ", "±": "\\pm ",
    "\f": "\\f", "\b": "\\b",  # `\frac` and `\binom` that went through JSON once too often
})


def plain(text: str) -> str:
    """Typographic signs as ASCII or LaTeX. Letters of other alphabets that look like Latin ones are left alone."""
    out = re.sub(r"\\sqrt +([0-9]+|[a-z])", r"\\sqrt{\1}", text.translate(_WIDE).translate(_PLAIN))
    out = re.sub(r"\\([lg]e)qslant(?![a-zA-Z])", r"\\\1", out)
    return out if "\\begin" in out else re.sub(r"\\\\(?=[a-zA-Z])", r"\\", out)  # `\\\\frac` of escaped LaTeX


_WRAP = re.compile(r"\\(?:text|textbf|textnormal|mathrm|mathbf|textrm|mbox|operatorname)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[,;:! ])|~")
_FRAC = re.compile(r"\\[dtc]?frac\s*(?:\{(-?[0-9]+)\}|([0-9]))\s*(?:\{(-?[0-9]+)\}|([0-9]))")


def normalise(text: str) -> str:
    """A form in which answers that are written alike compare equal: case, white space, dollar signs, text boxes,
    spacing commands, quotes, a final full stop and a leading article do not count."""
    out = plain(text).strip().strip("*_`").strip()
    out = _NOISE.sub(" ", _WRAP.sub(r"\1", out)).replace("$", "").replace("\\%", "%")
    out = re.sub(r"\\[dt]frac", r"\\frac", out)
    out = " ".join(out.casefold().split()).strip("\"'").rstrip(".").strip()
    out = re.sub(r"(?<=[^\W\d_]{2})[.!]+$", "", out)  # `yes!`, but `5!` is a factorial
    out = re.sub(r"^(?:the|an?) (?=\w)", "", out)
    return re.sub(r"\s*([(){}\[\],=+*/^<>|-])\s*", r"\1", out)


_WHOLE = re.compile(
    r"(?:[a-zA-Z]\s*=\s*)?(?P<sign>[-+]?)(?P<whole>[0-9]+ )?(?P<num>[0-9]*\.?[0-9]+|[0-9]+\.)"
    r"(?:[eE](?P<exp>[-+]?[0-9]{1,3}))?"
    r"(?:/(?P<den>[0-9]+))?\s?(?P<percent>%?)(?:\^\{?(?:circ|o)\}?)?"
    # words after a space, or a unit that is no product of variables: `2 hours`, `6th`, `3 cm^2`, not `2x`, `5 or 9`
    r"(?P<unit>(?:st|nd|rd|th|cm|mm|km|kg|mg|ml|hrs?|mins?|secs?|am|pm|mph|ft)\b"
    r"|(?<=\s)(?!(?:or|and|to|if|pi|sqrt|mod)\b)[a-zA-Z]{2}[a-zA-Z/ -]{0,40}(?:\^\{?[23]\}?)?)?")


def number(text: str) -> Fraction | None:
    """The value of an answer that is one number: commas, currency, units after it, fractions, mixed numbers, percent
    signs (ignored) and exponents. None for anything else, so that the algebra of `check` decides."""
    if len(text) > 120:
        return None
    out = _NOISE.sub(" ", _WRAP.sub(r" \1 ", plain(text))).replace("\\%", "%").replace("\\$", "").replace("$", "")
    out = re.sub(r"(?<=[0-9]),\s?(?=[0-9]{3}(?![0-9]))", "", out.replace("{,}", ",")).replace("\\circ", "circ")
    mixed = re.sub(r"(?<=[0-9])\s*\\[dt]?frac", r" \\frac", out)
    out = _FRAC.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", mixed)
    out = re.sub(r"\s*/\s*", "/", " ".join(out.split())).strip("*_` ").rstrip(". ")
    out = out[1:-1] if out[:1] == "(" and out[-1:] == ")" and "," not in out else out
    found = _WHOLE.fullmatch(out if "=" in out else out.replace("- ", "-"))
    if found is None or (found["whole"] and not found["den"]):
        return None
    value = Fraction(found["num"] if not found["num"].endswith(".") else found["num"][:-1])
    if found["exp"]:
        value *= Fraction(10) ** int(found["exp"])
    if found["den"]:
        if int(found["den"]) == 0:
            return None
        value /= int(found["den"])
    value += int(found["whole"] or 0)
    return -value if found["sign"] == "-" else value


def is_percent(text: str) -> bool:
    return text.rstrip(" $.*").endswith("%")


_MATH = re.compile(r"[0-9=^_<>+*/|\\]|^[a-z]$|\([^)]*,")


def kind_of(gold: str) -> Kind:
    """What an answer is, told from the reference: number, choice letter, yes/no, formula or text."""
    text = gold.strip().strip("$").strip()
    inner = _WRAP.sub(r"\1", text).strip()
    if re.fullmatch(r"\(?[A-J]\)?\.?", inner):
        return "letter"
    if inner.casefold().rstrip(".") in ("yes", "no", "true", "false"):
        return "bool"
    if number(text) is not None:
        return "number"
    if inner[:1] in "'\"" or (inner[:1] in "[{(" and re.search(r"['\"]", inner)):  # a literal of a program
        return "text"
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", "", inner))
    if ("\\" not in inner and len(words) >= 2) or not _MATH.search(inner):
        return "text"
    return "math"
