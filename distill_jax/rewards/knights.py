"""Knights and Knaves: who was said to be what, compared person by person.

Works on answers in sentences ("Zoey is a knight, and Luke is not a knight"), numbered lines, `Zoey: knave`,
"Knights: Zoey, Luke", and on the pairs of the generated world (`zoey knight luke knave`), for knights and knaves and
for the other pairs of names that puzzle generators use.
"""

import ast
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill_jax.rewards.answers import after_thinking
from distill_jax.rewards.check import Verdict
from distill_jax.rewards.sample import Sample

TRUE = ("knight", "pioneer", "saint", "hero", "angel", "altruist", "sage")
FALSE = ("knave", "laggard", "sinner", "villain", "devil", "egoist", "fool")
LONGEST = 4_000  # characters of an answer that are read; a final statement is not longer

_ROLE = re.compile(rf"\b(?:({'|'.join(TRUE)})|({'|'.join(FALSE)}))(?:e?s)?\b", re.IGNORECASE)
_HEDGE = re.compile(r"\s*(?:,|/|or|and|or/and|and/or)\s*(?:also\s+)?(?:both\s+)?(?:an?\s+)?", re.IGNORECASE)


def roles_of(answer: str, names: Sequence[str]) -> dict[str, bool | None]:
    """{name: True for one who tells the truth, False for a liar, None where both were said}; names that got no role
    are missing. A name's role is the next one named behind it, before any other sentence; `not` turns it."""
    text = re.sub(r"[*_`]+|\\(?:text|textbf|boxed)\b", " ", answer)[:LONGEST]
    found: dict[str, bool | None] = {}
    waiting: list[str] = []
    last: tuple[list[str], int] = ([], 0)  # who got the last role, and where its word ended: `a knight or a knave`
    heading: bool | None = None  # `Knights: Zoey, Luke` gives its role to what follows, to the end of the line or,
    listed = False  # where names stand below it, to the next empty line
    known = {n.casefold(): n for n in names}
    negated = False
    for match in _tokens(known).finditer(text) if known else ():
        if match["name"]:
            name = known[match["name"].casefold()]
            if heading is not None:
                _say(found, name, heading)
            else:
                waiting.append(name)
        elif match["head"] and not waiting:
            heading, listed = _is_true(match["head"]), text[match.end():].lstrip(" ").startswith("\n")
        elif match["head"] or match["role"]:
            heading = None
            if not waiting and _HEDGE.fullmatch(text, last[1], match.start()):
                waiting = last[0]
            for name in waiting:
                _say(found, name, _is_true(match[0]) != negated)
            last = (waiting, match.end())
            waiting, negated = [], False
        elif match["no"]:
            negated = True
        else:
            waiting, negated = [], False
            goes_on = match["end"] == ";" or (listed and match["end"] == "\n")
            heading = heading if goes_on else None
    return found


def _tokens(names: Iterable[str]) -> re.Pattern[str]:
    """What matters in an answer: a name, a role as a heading, a role, a negation, the end of a sentence or line."""
    name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(
        rf"(?P<name>\b(?:{name})\b)|(?P<head>{_ROLE.pattern}\s*(?:\([^)\n]*\)\s*)?:)|(?P<role>{_ROLE.pattern})"
        r"|(?P<no>\bnot\b|n't\b|\bneither\b)|(?P<end>[.;]|\n\s*\n|\n)", re.IGNORECASE)


def _is_true(word: str) -> bool:
    found = _ROLE.search(word)
    return found is not None and found[1] is not None


def _say(found: dict[str, bool | None], name: str, role: bool) -> None:
    found[name] = role if found.get(name, role) == role else None


_BEFORE_ROLE = re.compile(
    rf"\b([^\W\d_][\w'-]*)\b(?=:? (?:is )?(?:an? )?(?:{'|'.join((*TRUE, *FALSE))})\b)", re.IGNORECASE)


def gold_roles(gold: str) -> dict[str, bool]:
    """The roles that a reference answer states, its names being the words before them. ValueError if there are none."""
    before = _BEFORE_ROLE.findall(gold)
    names = [name for name in before if name.casefold() not in ("is", "a", "an", "the")]
    roles = roles_of(gold, names)
    if not roles or None in roles.values():
        raise ValueError(f"gold {gold[:80]!r} states no roles; expected e.g. 'Zoey is a knight, Luke is a knave'")
    return {name: bool(role) for name, role in roles.items()}


def judge(sample: Sample) -> Verdict:
    """Right if the answer gives every person of the gold its role and nobody two. `extracted` is what was said, as
    `Zoey knight, Luke knave`; method `roles`, `no_answer` (nobody got a role) or `unterminated`.

    An `<answer>` tag, or a box, is read alone where there is one: the last; what stands outside does not count.
    """
    body = after_thinking(sample.answer) if sample.terminated else None
    if body is None:
        return Verdict(correct=False, extracted=None, method="unterminated")
    gold = gold_roles(sample.gold)
    said = roles_of(_final(body), list(gold))
    if not said:
        return Verdict(correct=False, extracted=None, method="no_answer")
    words = {True: "knight", False: "knave", None: "both"}
    text = ", ".join(f"{name} {words[role]}" for name, role in sorted(said.items()))
    return Verdict(correct=said == gold, extracted=text, method="roles")


def _final(body: str) -> str:
    at = body.rfind("<answer>")
    if at >= 0:
        return body[at + len("<answer>"):].partition("</answer>")[0]
    at = body.rfind("\\boxed{")
    return body[at + len("\\boxed{"):] if at >= 0 else body[-LONGEST:]


def share_right(sample: Sample) -> float:
    """Share of the persons of the gold that got their role: a denser signal than the verdict."""
    if not sample.terminated:
        return 0.0
    gold = gold_roles(sample.gold)
    said = roles_of(_final(after_thinking(sample.answer) or ""), list(gold))
    return sum(said.get(name) is role for name, role in gold.items()) / len(gold)


def solutions(statements: str | Sequence[Any]) -> list[tuple[bool, ...]]:
    """Every assignment under which exactly those who tell the truth say true things, by trying all 2^n.

    statements   what each person says, in the notation of the Logic-RL puzzles, as a value or its Python text:
                 ('telling-truth', i), ('lying', i), ('not', s), ('and' | 'or', s, ...), ('->' | '<=>', s, s)
    """
    said = ast.literal_eval(statements) if isinstance(statements, str) else statements
    if len(said) > 16:
        raise ValueError(f"{len(said)} people: trying all assignments takes at most 16")
    return [roles for roles in itertools.product((True, False), repeat=len(said))
            if all(_holds(s, roles) == role for s, role in zip(said, roles))]


def _holds(statement: Sequence[Any], roles: Sequence[bool]) -> bool:
    kind, *rest = statement
    if kind in ("telling-truth", "lying"):
        return roles[rest[0]] == (kind == "telling-truth")
    if kind not in ("not", "and", "or", "->", "<=>"):
        raise ValueError(f"unknown statement {kind!r}; known: telling-truth, lying, not, and, or, ->, <=>")
    parts = [_holds(s, roles) for s in rest]
    if kind == "not":
        return not parts[0]
    if kind in ("and", "or"):
        return all(parts) if kind == "and" else any(parts)
    return parts[0] == parts[1] if kind == "<=>" else not parts[0] or parts[1]


def consistent(roles: Mapping[str, bool | None], names: Sequence[str], statements: str | Sequence[Any]) -> bool:
    """Whether an assignment solves the puzzle, without its gold: for puzzles with several solutions."""
    return tuple(roles.get(name) for name in names) in solutions(statements)
