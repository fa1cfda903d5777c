"""How an answer is compared with the accepted ones. Only the text after the thinking is ever looked at."""

import re
import string
from collections.abc import Callable

from distill_jax.eval.records import Answer, Grade, Item

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks (SQuAD; lost-in-the-middle's metrics.py)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def first_line(text: str) -> str:
    """The answer up to its first newline, after leading white space: the cut is on the answer, not on raw output."""
    return text.strip().split("\n", 1)[0].strip()


def best_subspan(text: str, golds: tuple[str, ...]) -> bool:
    """1 if any normalised gold is a substring of the normalised first line (2307.03172, best_subspan_em).

    Golds that normalise to nothing ("*") match nothing; the original lets them match everything.
    """
    said = normalise(first_line(text))
    return any(g in said for g in map(normalise, golds) if g)


def exact(text: str, golds: tuple[str, ...]) -> bool:
    """Normalised equality of the first line with any gold."""
    said = normalise(first_line(text))
    return any(g == said for g in map(normalise, golds) if g)


def contains(text: str, golds: tuple[str, ...]) -> bool:
    """Any gold, lower-cased, anywhere in the lower-cased answer (key-value retrieval)."""
    return any(g.lower() in text.lower() for g in golds if g)


GRADES: dict[str, Callable[[str, tuple[str, ...]], bool]] = {"qa": best_subspan, "exact": exact, "contains": contains}


def grader(check: Callable[[str, tuple[str, ...], str], bool] | None = None) -> Grade:
    """A grade by item kind; kinds not in `GRADES` go to `check(answer, golds, kind)` (`rewards.check`)."""

    def grade(item: Item, answer: Answer) -> bool:
        if item.kind in GRADES:
            return GRADES[item.kind](answer.text, item.golds)
        if check is None:
            raise ValueError(f"item kind {item.kind!r} needs an answer checker; built-in kinds: {sorted(GRADES)}")
        return check(answer.text, item.golds, item.kind)

    return grade
