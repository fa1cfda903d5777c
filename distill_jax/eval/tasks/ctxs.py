"""Multi-document questions from files in the lost-in-the-middle form (arXiv:2307.03172).

A row has `question`, `answers` and `ctxs` of `{title, text, isgold}`. Files with 10, 20 or 30 documents bring their
own distractors, in retrieval order. In `nq-open-oracle` every row has only its gold document: distractors are then
the gold documents of other questions (the paper's random-distractor ablation), leaks left out.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from distill_jax.eval.grade import normalise, usable_golds
from distill_jax.traces.formats import read_rows


@dataclass(frozen=True, kw_only=True)
class Passage:
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its gold passages (in hop order) and its distractors, nearest first."""

    id: str
    question: str
    golds: tuple[str, ...]
    gold: tuple[Passage, ...]
    distractors: tuple[Passage, ...]

    def shown(self, slots: Sequence[int], k: int) -> list[tuple[str, str]]:
        """(title, text) of k documents with the gold passages at the slots and the first distractors elsewhere."""
        rest = iter(self.distractors)
        at = dict(zip(slots, self.gold, strict=True))
        docs = [at[i] if i in at else next(rest) for i in range(k)]
        return [(d.title, d.text) for d in docs]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What could not be used, and how often distractors were refused: goes into the report."""

    empty_gold: int
    leaks: int


def read_questions(path: str | Path, k: int, limit: int, seed: int) -> tuple[list[Question], Dropped]:
    """Up to `limit` questions with at least k - 1 distractors each.

    Rows whose golds normalise to nothing (`*`) are dropped: every answer would be right. Raises ValueError for a
    file of another form, or where a question has too few documents.
    """
    rows = list(read_rows(path))
    for row in rows[:1]:
        if not {"question", "answers", "ctxs"} <= set(row):
            raise ValueError(f"{path} is no lost-in-the-middle file: rows have {sorted(row)}, "
                             "expected question, answers, ctxs")
    kept = [(i, r) for i, r in enumerate(rows) if usable_golds(r["answers"])]
    if not kept:
        raise ValueError(f"{path} has no row with a usable answer")
    pool = [_gold(r) for _, r in kept]
    leaks = 0
    out = []
    for n, (i, row) in enumerate(kept[:limit]):
        golds = usable_golds(row["answers"])
        own = [_passage(c) for c in row["ctxs"] if c is not _gold_context(row)]
        if len(row["ctxs"]) == 1 and k > 1:
            own, refused = borrowed(golds, pool[n], pool, k - 1, random.Random(f"{seed}/{i}"))
            leaks += refused
        if len(own) < k - 1:
            raise ValueError(f"{path}, row {i}: {len(own)} distractors, but k={k} needs {k - 1}; "
                             f"the largest k of this file is {len(own) + 1}")
        out.append(Question(id=str(i), question=row["question"], golds=golds, gold=(pool[n],),
                            distractors=tuple(own)))
    return out, Dropped(empty_gold=len(rows) - len(kept), leaks=leaks)


def borrowed(golds: Sequence[str], own: Passage, pool: Sequence[Passage], count: int,
             rng: random.Random) -> tuple[list[Passage], int]:
    """`count` passages of other questions that do not hold an answer, and how many were refused for holding one.

    A passage holds an answer when a normalised gold is a substring of its normalised title and text, as the metric
    would find it. The first k - 1 of a longer list are those of a shorter one, so growing k only adds documents.
    """
    needles = [normalise(g) for g in golds]
    refused = 0

    def fits(p: Passage) -> bool:
        nonlocal refused
        if p.title == own.title:
            return False
        text = normalise(f"{p.title} {p.text}")
        leak = any(n in text for n in needles)
        refused += leak
        return not leak

    order = rng.sample(range(len(pool)), len(pool))
    return list(islice((pool[j] for j in order if fits(pool[j])), count)), refused


def _gold_context(row: Mapping[str, Any]) -> Mapping[str, Any]:
    marked = [c for c in row["ctxs"] if c.get("isgold")]
    if len(marked) != 1:
        raise ValueError(f"question {row['question']!r} has {len(marked)} gold documents, expected exactly one "
                         "with isgold")
    return marked[0]


def _gold(row: Mapping[str, Any]) -> Passage:
    return _passage(_gold_context(row))


def _passage(ctx: Mapping[str, Any]) -> Passage:
    return Passage(title=ctx["title"], text=ctx["text"])
