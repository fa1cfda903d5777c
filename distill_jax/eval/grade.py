"""How an answer is compared with the accepted ones. Only the text after the thinking is ever looked at.

`best_subspan` is the metric of Liu et al. 2023 (arXiv:2307.03172) with two changes that reasoning models need: the
first-line cut (without which copying the context is right) is made on the extracted answer, after blank lines before
it are gone; and golds that normalise to nothing (`*`) match nothing, where the original lets them match everything.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import cast

from distill_jax.eval.records import Answer, Item
from distill_jax.rewards.answers import Kind
from distill_jax.rewards.checker import Checker, Query

_DELETE = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """SQuAD normalisation: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE)).split())


def usable_golds(golds: Sequence[str]) -> tuple[str, ...]:
    """The golds that normalise to something."""
    return tuple(g for g in golds if normalise(g))


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return text.strip().split("\n", 1)[0].strip()


def short_answer(text: str) -> str:
    """What is to be compared word by word: the first line, after `answer is` or `Answer:` where it says so."""
    line = first_line(text)
    return re.split(r"(?i)\banswer(?: is|:)\s*:?\s*", line)[-1].strip().strip("*\"'").rstrip(".")


def best_subspan(text: str, golds: Sequence[str]) -> bool:
    """Whether a normalised gold is a substring of the normalised first line."""
    said = normalise(first_line(text))
    return any(normalise(g) in said for g in usable_golds(golds))


def exact(text: str, golds: Sequence[str]) -> bool:
    """Whether the short answer and a gold are equal when normalised (SQuAD's exact match)."""
    return normalise(short_answer(text)) in {normalise(g) for g in usable_golds(golds)}


def contains(text: str, golds: Sequence[str]) -> bool:
    """Whether a gold is anywhere in the answer, case aside (key-value retrieval)."""
    return any(g.lower() in text.lower() for g in golds if g)


def token_f1(text: str, golds: Sequence[str]) -> float:
    """Best F1 over the golds between the normalised tokens of the short answer and of a gold (SQuAD)."""
    said = normalise(short_answer(text)).split()
    return max((_f1(said, normalise(g).split()) for g in golds), default=0.0)


def _f1(said: list[str], gold: list[str]) -> float:
    common = sum((Counter(said) & Counter(gold)).values())
    return 2 * common / (len(said) + len(gold)) if common else 0.0


GRADES = {"qa": best_subspan, "exact": exact, "contains": contains}


def grade_all(items: Sequence[Item], answers: Sequence[Answer]) -> list[bool | None]:
    """Whether each answer counts, None where the check ran out of time.

    Without an answer (a problem, thinking that never ended) nothing counts. Kinds that are not in `GRADES` go to the
    answer checker of the rewards, with its time limits.
    """
    out: list[bool | None] = [False] * len(items)
    open_: list[int] = []
    for i, (item, answer) in enumerate(zip(items, answers, strict=True)):
        if answer.problem or not answer.finished:
            continue
        if item.kind in GRADES:
            out[i] = GRADES[item.kind](answer.text, item.golds)
        else:
            open_.append(i)
    if open_:
        queries = [Query(completion=answers[i].text, golds=items[i].golds, kind=cast(Kind, items[i].kind))
                   for i in open_]
        with Checker() as checker:
            verdicts = checker.map(queries)
        for i, verdict in zip(open_, verdicts, strict=True):
            out[i] = verdict.correct
    return out
