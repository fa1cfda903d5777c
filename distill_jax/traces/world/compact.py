"""The compact rendering: one word, one token, about four tokens a document. For the quickstart and for tests.

    doc lives anna oslo doc grows rome rice doc grows oslo tea doc lives carl rome ask grows lives anna
    lives anna oslo grows oslo tea
    tea

The relation comes first, so that a value directly follows what it is about: small models learn to look such facts up
in hundreds of steps, and with the relation in between only in thousands (docs/LOG.md).
"""

from distill_jax.traces.world.draw import Draw, words
from distill_jax.traces.world.facts import DocumentQuestion, Entity, Fact
from distill_jax.traces.world.lexicon import COMPACT as LEXICON
from distill_jax.traces.world.puzzles import Arithmetic, Knights, Statement
from distill_jax.traces.world.thoughts import (
    Examine,
    NinesCheck,
    Prefer,
    Read,
    Recheck,
    Seek,
    Suppose,
    Testing,
    Thought,
    Work,
)

WORDS = words(
    "doc ask lives grows works owns rule latest trust says is same differ and or knight knave plus minus times "
    "carry write suppose true false ok no yes check seek over nines : ;")
name = LEXICON.name


def vocabulary() -> list[str]:
    """Every word this rendering can print."""
    named = [w for names in LEXICON.names.values() for n in names for w in n.split()]
    return list(dict.fromkeys([*WORDS, *map(str, range(10)), *named]))


def question(q: DocumentQuestion | Knights | Arithmetic, draw: Draw) -> str:
    if isinstance(q, Knights):
        said = " ; ".join(f"{_person(q, i)} says {_statement(q, s)}" for i, s in enumerate(q.says))
        return f"{said} ask knight or knave"
    if isinstance(q, Arithmetic):
        return f"ask {_spaced(q.a)} {q.op} {_spaced(q.b)}"
    if q.kind == "kv":
        pairs = " ; ".join(f"{name(d[0].subject)} : {name(d[0].value)}" for d in q.documents)
        return f"{pairs} ask {name(q.subject)}".lstrip()
    if q.kind == "long_document":
        docs = ["doc " + " ; ".join(fact(f) for d in q.documents for f in d)] if q.documents else []
    else:
        docs = [f"doc {fact(d[0])}" + "".join(f" {f.relation} {name(f.value)}" for f in d[1:]) for d in q.documents]
    rule = []
    if q.rule:
        order = [name(Entity("source", s)) for s in q.rule.order]
        rule = ["rule latest" if q.rule.name == "latest" else "rule trust " + " ".join(order)]
    return " ".join([*docs, *rule, "ask", *reversed(q.path), name(q.subject)])


def answer(q: DocumentQuestion | Knights | Arithmetic) -> str:
    if isinstance(q, Knights):
        return _roles(q, q.roles)
    return _spaced(q.value) if isinstance(q, Arithmetic) else name(q.value)


def thinking(q: DocumentQuestion | Knights | Arithmetic, thoughts: list[Thought], draw: Draw) -> str:
    return " ".join(_thought(q, t) for t in thoughts)


def _thought(q: DocumentQuestion | Knights | Arithmetic, thought: Thought) -> str:
    match thought:
        case Seek(sought):
            return "seek " + ("" if sought.relation == "opens" else f"{sought.relation} ") + name(sought.subject)
        case Read(_, read, wrong):
            return fact(read) + (" no" if wrong else "")
        case Recheck(_, read):
            return f"check {fact(read)} yes"
        case Prefer(winner, loser):
            assert isinstance(q, DocumentQuestion) and q.rule
            mark = _year if q.rule.name == "latest" else _source
            return f"{mark(winner)} over {mark(loser)}"
        case Suppose(roles, truths):
            assert isinstance(q, Knights)
            if truths:
                return "suppose " + " ".join(f"{_person(q, i)} {_truth(r)}" for i, r in enumerate(roles))
            return "suppose " + _roles(q, roles)
        case Examine(speaker, true, fits, roles):
            assert isinstance(q, Knights)
            said = f"{_held(q, q.says[speaker], roles)} " if roles else ""
            by = f"{_person(q, speaker)} {_truth(roles[speaker])}" if roles else _person(q, speaker)
            return f"{by} says {said}{_truth(true)} {'ok' if fits else 'no'}"
        case Testing(again):
            return "check" if again else "seek"
        case Work(op, c, slip):
            bottom_and_carry = f"{c.top} {op} {c.bottom} carry {0 if slip else c.carry} write"
            return f"{bottom_and_carry} no" if slip else f"{bottom_and_carry} {c.digit} carry {c.carry_out}"
        case NinesCheck(remainder):
            return f"check nines {remainder} yes"


def fact(f: Fact) -> str:
    """`lives anna oslo`, with year and source where the fact has them."""
    if f.relation == "opens":
        return f"{name(f.subject)} : {name(f.value)}"
    dated = f" {_year(f)} {_source(f)}" if f.year else ""
    return f"{f.relation} {name(f.subject)} {name(f.value)}{dated}"


def _year(f: Fact) -> str:
    return name(Entity("year", f.year - 1))


def _source(f: Fact) -> str:
    return name(Entity("source", f.source))


def _person(q: Knights, i: int) -> str:
    return name(Entity("first", q.people[i]))


def _role(knight: bool) -> str:
    return "knight" if knight else "knave"


def _truth(true: bool) -> str:
    return "true" if true else "false"


def _roles(q: Knights, roles: tuple[bool, ...]) -> str:
    return " ".join(f"{_person(q, i)} {_role(r)}" for i, r in enumerate(roles))


def _statement(q: Knights, s: Statement) -> str:
    a, b = _person(q, s.a), _person(q, s.b) if s.b >= 0 else ""
    if s.form == "is":
        return f"{a} is {_role(s.role_a)}"
    if s.form in ("same", "differ"):
        return f"{a} {s.form} {b}"
    return f"{a} {_role(s.role_a)} {s.form} {b} {_role(s.role_b)}"


def _held(q: Knights, s: Statement, roles: tuple[bool, ...]) -> str:
    """A statement held against supposed roles, part by part: `carl true knave no or bob true knight yes`, `carl true
    same bob false`. A role supposed always follows its name, so it is copied before anything is made of it."""
    a, b = (f"{_person(q, i)} {_truth(roles[i])}" if i >= 0 else "" for i in (s.a, s.b))
    if s.form in ("same", "differ"):
        return f"{a} {s.form} {b}"
    part = lambda i, said: f"{_role(said)} {'yes' if roles[i] == said else 'no'}"
    if s.form == "is":
        return f"{a} is {part(s.a, s.role_a)}"
    return f"{a} {part(s.a, s.role_a)} {s.form} {b} {part(s.b, s.role_b)}"


def _spaced(n: int) -> str:
    return " ".join(str(n))
