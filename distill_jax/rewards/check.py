"""Is a completion right? One function for rewards, imports and evaluation.

`decide` settles what plain Python can settle: unfinished thinking, equal texts, numbers, letters, yes/no. What is
left is algebra (math-verify, sympy), which can run for ever: `rewards.checker` gives it processes with a time limit.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from distill_jax.rewards.answers import Kind, after_thinking, extract, is_percent, kind_of, normalise, number, plain

RELATIVE = Fraction(1, 1_000_000)
"""Numbers that are not both whole are equal when they differ by less than this share (0.333333 for 1/3)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check found.

    correct    None where it could not decide: time-out, crash, no gold, or (unclear) a text that names the gold among
               other words: "Second place" for "second"
    extracted  the final answer that was found, None where the completion states none
    method     what decided: exact, number, letter, bool, text, contains, math, no_answer, unterminated, unclear,
               no_gold, timeout, crash; what `rewards.judges` adds stands there
    """

    correct: bool | None
    extracted: str | None
    method: str
    timed_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What is left to algebra: an extracted answer and the golds it may be equal to; `method` if it is to none."""

    extracted: str
    golds: tuple[str, ...]
    method: str


def check(completion: str, golds: str | Sequence[str], kind: Kind = "auto") -> Verdict:
    """The verdict on a completion or a bare answer, algebra in this process and without a time limit.

    golds   the reference answer, or several that all count
    kind    what the answer is; told from each gold by default
    For untrusted text in bulk use `rewards.checker.Checker`.
    """
    return resolve(decide(completion, golds, kind), math_equal)


def resolve(step: Verdict | Pending, equal: Callable[[str, str], bool]) -> Verdict:
    """The verdict once `equal(gold, answer)` is asked about what `decide` left open."""
    if isinstance(step, Verdict):
        return step
    right = any(equal(gold, step.extracted) for gold in step.golds)
    return Verdict(correct=right, extracted=step.extracted, method="math" if right else step.method)


def decide(completion: str, golds: str | Sequence[str], kind: Kind = "auto") -> Verdict | Pending:
    """The verdict if it needs no algebra, else what algebra has to compare."""
    golds = [golds] if isinstance(golds, str) else list(golds)
    golds = [g for g in golds if g.strip()]
    if not golds:
        return Verdict(correct=None, extracted=None, method="no_gold")
    body = after_thinking(completion)
    if body is None:
        return Verdict(correct=False, extracted=None, method="unterminated")
    last: str | None = None
    method = "no_answer"
    open_golds: dict[str, list[str]] = {}
    for gold in golds:
        what = kind_of(gold) if kind == "auto" else kind
        if what not in ("contains", "letter") and same_text(body, gold):
            return Verdict(correct=True, extracted=gold[:1000], method="exact")
        found = body.strip() if what == "contains" else extract(body, what)
        if found is None:
            continue
        same, method = compare(found, gold, what)
        if what == "text" and not same and _words(gold) and f" {_words(gold)} " in f" {_words(found)} ":
            return Verdict(correct=None, extracted=found[:1000], method="unclear")
        if same:
            return Verdict(correct=True, extracted=found[:1000], method=method)
        if same is None:
            open_golds.setdefault(found, []).append(gold)
        last = found[:1000]
    if open_golds:
        answer, left = next(iter(open_golds.items()))
        return Pending(extracted=answer, golds=tuple(left), method="math")
    return Verdict(correct=False, extracted=last, method=method)


def same_text(body: str, gold: str) -> bool:
    """Whether a completion is the gold and nothing else."""
    if len(body) > 4 * len(gold) + 100:
        return False
    left, right = normalise(body), normalise(gold)
    return left == right and (bool(left) or body.strip() == gold.strip())


def compare(answer: str, gold: str, kind: Kind) -> tuple[bool | None, str]:
    """(equal, method); equal is None where only algebra can tell."""
    if kind == "contains":
        return f" {_words(gold)} " in f" {_words(answer)} " and bool(_words(gold)), "contains"
    left, right = normalise(answer), normalise(gold)
    if kind == "letter":
        return choice_letter(answer) == choice_letter(gold), "letter"
    if kind == "bool":
        return _truth(left) is not None and _truth(left) == _truth(right), "bool"
    if left == right and left:
        return True, "exact"
    if kind in ("number", "math", "auto"):
        if "=" in answer and "=" not in gold:  # `x + y = 5` answers with 5
            answer = answer.rpartition("=")[2].strip(" .")
        a, g = number(answer), number(gold)
        if a is not None and g is not None:
            return same_number(a, g, percent=is_percent(answer) != is_percent(gold)), "number"
        return (None if is_formula(answer) and is_formula(gold) else False), "math"
    return _words(answer) == _words(gold) and bool(_words(gold)), "text"


def same_number(a: Fraction, b: Fraction, percent: bool = False) -> bool:
    """Whether two numbers are one answer. `percent`: one of them has a percent sign, so 50% may stand for 0.5."""
    if a.denominator == 1 and b.denominator == 1 and not percent:
        return a == b
    close = lambda x, y: abs(x - y) <= RELATIVE * abs(y)
    return close(a, b) or (percent and (close(a, 100 * b) or close(100 * a, b)))


_KNOWN = frozenset(re.findall(r"\w+", """
    frac dfrac tfrac cfrac sqrt pi infty cup cap left right cdot times div pm mp le leq ge geq lt gt ne neq in notin
    text textbf textnormal mathrm mathbf mathbb mathcal mathit mbox operatorname begin end log ln lg exp sin cos tan
    cot sec csc arcsin arccos arctan sinh cosh tanh circ degree binom dbinom tbinom emptyset varnothing setminus mid
    lfloor rfloor lceil rceil alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega Delta
    Gamma Omega quad qquad displaystyle mod bmod pmod sum prod int lim to max min gcd lcm det langle rangle vert
    lvert rvert ldots cdots dots dollar percent angle"""))
"""LaTeX commands math-verify's grammar reads. It drops what it does not know and reads the rest as a whole formula
(`15.\\overline{3}` as 15, `3√13` as 3), so a text with anything else is not put to it."""


def is_formula(text: str) -> bool:
    """Whether math-verify can be asked: algebra of bounded size and depth, in signs and commands that it knows."""
    text = plain(text)
    known = all(name in _KNOWN for name in re.findall(r"\\([a-zA-Z]+)", text))
    grid = re.search(r"[0-9]\s+[0-9]|\n", text)  # digits side by side would be read as their product
    bounded = len(text) <= 500 and max_depth(text) <= 30
    return known and not grid and bounded and text.isascii() and any(map(str.isalnum, text))


def max_depth(text: str) -> int:
    depth = deepest = 0
    for c in text:
        depth += (c in "{([") - (c in "})]")
        deepest = max(deepest, depth)
    return deepest


def choice_letter(text: str) -> str | None:
    """The choice letter of an answer: `C`, `(C)`, `C) 20 km`, `\\text{C}`."""
    bare = normalise(text).upper().strip("()[]{} ")
    return bare[0] if bare and bare[0] in "ABCDEFGHIJ" and (len(bare) == 1 or bare[1] in ").:]") else None


def _truth(normal: str) -> bool | None:
    word = normal.split(",")[0].split(" ")[0].strip(".")
    return True if word in ("yes", "true") else False if word in ("no", "false") else None


def _words(text: str) -> str:
    """Lower-case words without punctuation and articles, as open questions are scored."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " if c == "-" else "" for c in plain(text).casefold())
    return " ".join(w for w in kept.split() if w not in ("a", "an", "the"))


_RELATION = re.compile(r"[<>≤≥]|\\(?:le|leq|leqslant|lt|ge|geq|geqslant|gt)(?![a-zA-Z])")


def math_equal(gold: str, answer: str) -> bool:
    """math-verify's opinion, without time limits of its own (they need the main thread and signals)."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        left, right = (parse(f"${_bare(t)}$", parsing_timeout=None) for t in (gold, answer))  # type: ignore[arg-type]
        # `x < 2` for an interval: math-verify takes it the other way round only
        turned = _RELATION.search(answer) is not None and _RELATION.search(gold) is None
        left, right = (right, left) if turned else (left, right)
        return bool(left and right and verify(left, right, timeout_seconds=None))
    except (Exception, RecursionError):  # a string that its grammar or sympy cannot take is no equal answer
        return False


def _bare(text: str) -> str:
    """The formula without dollar signs around or inside it, typographic and program notation as LaTeX."""
    out = plain(text).replace("\\$", "").replace("$", "").strip()
    out = re.sub(r"\s+(?:or|and)\s+", ", ", out)
    out = re.sub(r"(?<![\\a-zA-Z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", out)
    return re.sub(r"(?<![\\a-zA-Z])(pi|infty|sin|cos|tan|log|ln)(?![a-zA-Z])", r"\\\1 ", out)
