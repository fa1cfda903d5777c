"""Oracle reasoning as programs: the thoughts that lead to an answer, before they are put into words.

`minimal` says what is needed and nothing else. `extended` re-reads, checks, and takes a wrong branch that it
notices and leaves, the habits of long traces of reasoning models.

For Knights and Knaves alone: `careful` repeats each statement next to the supposed roles before judging it, and goes
on until a supposition holds. `varied` is that in a third of the traces, which then mostly test their solution again
for nothing; the others believe a supposition after one test or none, and are right by luck: what is left of a teacher's
traces when only their answers are verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distill_jax.traces.world.draw import Draw
from distill_jax.traces.world.facts import DocumentQuestion, Fact
from distill_jax.traces.world.puzzles import Arithmetic, Column, Knights, columns

Style = Literal["minimal", "extended", "careful", "varied"]
STYLES: tuple[Style, ...] = ("minimal", "extended", "careful", "varied")
PUZZLING: tuple[Style, ...] = ("careful", "varied")
"""Styles that are for Knights and Knaves alone."""
WRONG_BRANCHES = 2
"""Most wrong suppositions of an extended trace about Knights and Knaves."""
QUICK = 0.65
"""Share of `varied` traces that hardly test."""
RECHECKS = (0.8, 0.7)
"""`varied`: how often a solution that was tested is tested a second time, and then a third time."""
HOLDS = 0.4
"""`careful`: how often the next supposition is the right one, up to the last one there is."""


@dataclass(frozen=True)
class Seek:
    """What is to be found next: the `relation` of `fact.subject`."""

    fact: Fact


@dataclass(frozen=True)
class Read:
    """A fact read from a document (index from 0). wrong: it is not the one that was sought, and is left again."""

    document: int
    fact: Fact
    wrong: bool = False


@dataclass(frozen=True)
class Recheck:
    """The same fact read a second time, and found to be as read."""

    document: int
    fact: Fact


@dataclass(frozen=True)
class Prefer:
    """Of two documents that disagree, `winner` counts by the rule of the question."""

    winner: Fact
    loser: Fact


@dataclass(frozen=True)
class Suppose:
    """Suppose these roles (True: knight). truths: said as who tells the truth, so that a role supposed cannot be taken
    for one that somebody claims."""

    roles: tuple[bool, ...]
    truths: bool = False


@dataclass(frozen=True)
class Examine:
    """What `speaker` says is `true` under the roles supposed last; it `fits` when it is true of a knight or false of
    a knave. roles: the statement is repeated, each part held against these roles, before it is judged."""

    speaker: int
    true: bool
    fits: bool
    roles: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Testing:
    """What follows is tested statement by statement; again: what has just been found, a second time."""

    again: bool = False


@dataclass(frozen=True)
class Work:
    """One column of school arithmetic. slip: the carry was forgotten, which is noticed and done again."""

    op: str
    column: Column
    slip: bool = False


@dataclass(frozen=True)
class NinesCheck:
    """Casting out nines: left and right side have this remainder."""

    remainder: int


Thought = Seek | Read | Recheck | Prefer | Suppose | Examine | Testing | Work | NinesCheck


def think(q: "DocumentQuestion | Knights | Arithmetic", style: Style, draw: Draw) -> list[Thought]:
    """The oracle's thoughts on a question."""
    if isinstance(q, Knights):
        return _knights(q, style, draw)
    if isinstance(q, Arithmetic):
        return _arithmetic(q, style, draw)
    return _conflict(q, style, draw) if q.rule else _documents(q, style, draw)


def _documents(q: DocumentQuestion, style: Style, draw: Draw) -> list[Thought]:
    hops = q.hop_facts()
    out: list[Thought] = []
    lost = draw.below(len(hops)) if style == "extended" else -1  # the hop at which the oracle goes astray
    for i, (doc, fact) in enumerate(hops):
        if style == "extended":
            out.append(Seek(fact))
        if i == lost:
            out += _wrong_branch(q, doc, fact, draw)
        out.append(Read(doc, fact))
    if style == "extended":
        out += [Recheck(doc, fact) for doc, fact in hops]
    return out


def _wrong_branch(q: DocumentQuestion, doc: int, fact: Fact, draw: Draw) -> list[Thought]:
    """A fact of the same relation about something else, taken for the right one for a moment."""
    others = [(i, f) for i, d in enumerate(q.documents) for f in d
              if f.relation == fact.relation and f.subject != fact.subject]
    return [Read(*draw.pick(others), wrong=True)] if others else []


def _conflict(q: DocumentQuestion, style: Style, draw: Draw) -> list[Thought]:
    rivals = [(i, f) for i, d in enumerate(q.documents) for f in d if f.subject == q.subject]
    best = q.answer_fact
    out: list[Thought] = []
    if style == "extended":
        out += [Seek(best), *_wrong_branch(q, q.gold[-1], best, draw)]
    out += [Read(i, f) for i, f in rivals]
    out += [Prefer(best, f) for _, f in rivals if f != best]
    if style == "extended":
        out.append(Recheck(q.gold[-1], best))
    return out


def _knights(q: Knights, style: Style, draw: Draw) -> list[Thought]:
    """How many wrong suppositions come first is drawn, none among them: were it always one, the place of a supposition
    would say whether it holds, and nobody would learn to test it."""
    if style in PUZZLING:
        quick = style == "varied" and draw.chance(QUICK)
        return _quick(q, draw) if quick else _careful(q, RECHECKS if style == "varied" else (), draw)
    out: list[Thought] = []
    if style == "extended":
        wrong = [r for r in _assignments(len(q.roles)) if r != q.roles]
        for i in draw.distinct(len(wrong), draw.below(WRONG_BRANCHES + 1)):
            out += _try(q, wrong[i])
    return out + _try(q, q.roles)


def _quick(q: Knights, draw: Draw) -> list[Thought]:
    """One wrong supposition at most, left where the first statement does not fit it; the next is believed, tested on
    the first statement or not at all. Only its being right lets such a trace pass a check of answers."""
    left: list[Thought] = []
    if draw.chance(0.5):
        wrong = [r for r in _assignments(len(q.roles)) if q.says[0].holds(r) != r[0]]
        left = _try(q, draw.pick(wrong), repeat=True)
    return left + _try(q, q.roles, repeat=True)[:1 + draw.below(2)]


def _careful(q: Knights, rechecks: Sequence[float], draw: Draw) -> list[Thought]:
    """Suppositions in the order of binary numbers, beginning anywhere, each tested up to the first statement that does
    not fit, until one holds: nothing has to be remembered but the last. The number of wrong ones is geometric, so that
    where one stands hardly says whether it holds."""
    every = _assignments(len(q.roles))
    wrong, last = 0, every.index(q.roles)
    while wrong < len(every) - 1 and not draw.chance(HOLDS):
        wrong += 1
    out: list[Thought] = [Testing()]
    for i in range(last - wrong, last + 1):
        out += _try(q, every[i % len(every)], repeat=True)
    for share in rechecks:
        if not draw.chance(share):
            break
        out += [Testing(again=True), *_try(q, q.roles, repeat=True)[1:]]
    return out


def _assignments(n: int) -> list[tuple[bool, ...]]:
    return [tuple(bool(bits >> i & 1) for i in range(n)) for bits in range(2**n)]


def _try(q: Knights, roles: tuple[bool, ...], repeat: bool = False) -> list[Thought]:
    """Suppose roles and test the statements in order, up to the first that does not fit."""
    out: list[Thought] = [Suppose(roles, truths=repeat)]
    for i, statement in enumerate(q.says):
        true = statement.holds(roles)
        out.append(Examine(i, true, true == roles[i], roles if repeat else None))
        if true != roles[i]:
            break
    return out


def _arithmetic(q: Arithmetic, style: Style, draw: Draw) -> list[Thought]:
    steps = columns(q)
    carried = [i for i, c in enumerate(steps) if c.carry]
    slip = draw.pick(carried) if style == "extended" and carried else -1
    out: list[Thought] = []
    for i, c in enumerate(steps):
        if i == slip:
            out.append(Work(q.op, c, slip=True))
        out.append(Work(q.op, c))
    if style == "extended":
        out.append(NinesCheck(q.value % 9))
    return out
