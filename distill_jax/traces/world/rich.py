"""The rich rendering: paraphrased running text over a vocabulary of thousands of words, with filler and entropy.

Document prompts have the exact form of Liu et al. 2023 (arXiv:2307.03172), "Lost in the Middle", so that models and
evaluations meet one format for generated and for real documents.
"""

from collections.abc import Sequence

from distill_jax.traces.world import filler, phrases
from distill_jax.traces.world.draw import Draw
from distill_jax.traces.world.facts import DocumentQuestion, Entity, Fact
from distill_jax.traces.world.lexicon import RICH as LEXICON
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

name = LEXICON.name

INSTRUCTION = ("Write a high-quality answer for the given question using only the provided search results "
               "(some of which might be irrelevant).")


def documents_prompt(question: str, documents: Sequence[tuple[str, str]]) -> str:
    """The prompt of Liu et al. for `(title, text)` documents, numbered from 1; ends with `Answer:`."""
    lines = [f"Document [{i}](Title: {title}) {text}" for i, (title, text) in enumerate(documents, 1)]
    return f"{INSTRUCTION}\n\n" + "\n".join(lines) + f"\n\nQuestion: {question}\nAnswer:"


def single_document_prompt(question: str, text: str) -> str:
    return f"Read the document and answer the question.\n\nDocument: {text}\n\nQuestion: {question}\nAnswer:"


def closed_book_prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def kv_prompt(key: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The key-value prompt of Liu et al.: a JSON object with one pair a line, in order."""
    body = ",\n ".join(f'"{k}": "{v}"' for k, v in pairs)
    return ("Extract the value corresponding to the specified key in the JSON object below.\n\n"
            f'JSON data:\n{{{body}}}\n\nKey: "{key}"\nCorresponding value:')


def question(q: DocumentQuestion | Knights | Arithmetic, draw: Draw) -> str:
    if isinstance(q, Knights):
        return _knights_question(q)
    if isinstance(q, Arithmetic):
        sign = {"plus": "+", "minus": "-", "times": "*"}[q.op]
        ask = draw.pick(["What is {a} {s} {b}?", "Compute {a} {s} {b}.", "How much is {a} {s} {b}?"])
        return ask.format(a=q.a, b=q.b, s=sign)
    if q.kind == "kv":
        pairs = [(name(d[0].subject), name(d[0].value)) for d in q.documents]
        key = name(q.subject)
        return kv_prompt(key, pairs) if pairs else closed_book_prompt(f"Which value has the key {key}?")
    ask = draw.pick(phrases.QUESTION[q.path]).format(s=name(q.subject))
    if q.rule:
        ask = f"{_rule(q, draw)} {ask}"
    if not q.documents:
        return closed_book_prompt(ask)
    # One stream per document, keyed by its facts: the wording of a document does not depend on where it stands.
    seed = draw.below(1 << 30)
    docs = [(_title(doc), _document(doc, Draw(seed, doc))) for doc in q.documents]
    if q.kind == "long_document":
        text = " ".join(text for _, text in docs)
        return single_document_prompt(ask, text)
    return documents_prompt(ask, docs)


def answer(q: DocumentQuestion | Knights | Arithmetic) -> str:
    if isinstance(q, Knights):
        return _roles(q, q.roles)
    return str(q.value) if isinstance(q, Arithmetic) else name(q.value)


def thinking(q: DocumentQuestion | Knights | Arithmetic, thoughts: list[Thought], draw: Draw) -> str:
    said = [_thought(q, t, draw) for t in thoughts]
    end = phrases.END_ROLES if isinstance(q, Knights) else phrases.END
    return " ".join([*said, draw.pick(end).format(a=answer(q))])


def _title(doc: tuple[Fact, ...]) -> str:
    return name(doc[0].subject)


def _document(doc: tuple[Fact, ...], draw: Draw) -> str:
    """The facts in order, with up to two sentences of filler around each."""
    out: list[str] = []
    for fact in doc:
        before = draw.below(3)
        out += [filler.sentence(draw) for _ in range(before)]
        said = _sentence(draw.pick(phrases.FACT[fact.relation]), fact)
        if fact.year:
            said = _upper(draw.pick(phrases.DATED).format(f=said, y=_year(fact), o=_source(fact)))
        out += [said, *(filler.sentence(draw) for _ in range(draw.below(3 - before)))]
    return " ".join(out)


def _thought(q: DocumentQuestion | Knights | Arithmetic, thought: Thought, draw: Draw) -> str:
    match thought:
        case Seek(fact):
            return draw.pick(phrases.SEEK[fact.relation]).format(s=name(fact.subject))
        case Read(document, fact, wrong):
            read = phrases.READ if _numbered(q) else phrases.READ_PLAIN
            said = draw.pick(read).format(d=document + 1, f=_said(fact, draw))
            return said + (" " + draw.pick(phrases.WRONG).format(s=name(fact.subject)) if wrong else "")
        case Recheck(document, fact):
            known = phrases.RECHECK if _numbered(q) else phrases.RECHECK[:3]
            return draw.pick(known).format(d=document + 1, f=_said(fact, draw))
        case Prefer(winner, loser):
            return _prefer(q, winner, loser, draw)
        case Suppose(roles, _):
            assert isinstance(q, Knights)
            return draw.pick(phrases.SUPPOSE).format(r=_roles(q, roles))
        case Examine(speaker, true, fits, roles):
            assert isinstance(q, Knights)
            said = f"{_held(q, q.says[speaker], roles)} " if roles else ""
            role = _role(true == fits)  # a true statement fits a knight, a false one a knave
            ways = phrases.EXAMINE_FITS if fits else phrases.EXAMINE_FAILS
            return said + draw.pick(ways).format(p=_person(q, speaker), t="true" if true else "false", k=role)
        case Testing(again):
            return draw.pick(phrases.AGAIN if again else phrases.TESTING)
        case Work(op, c, slip):
            total = {"plus": c.top + c.bottom + c.carry, "minus": 0, "times": c.top * c.bottom + c.carry}[op]
            ways = phrases.SLIP if slip else phrases.COLUMN[op]
            return draw.pick(ways).format(t=c.top, b=c.bottom, c=c.carry, x=total, w=c.digit, o=c.carry_out)
        case NinesCheck(remainder):
            return draw.pick(phrases.NINES).format(x=remainder)


def _numbered(q: DocumentQuestion | Knights | Arithmetic) -> bool:
    return isinstance(q, DocumentQuestion) and q.kind not in ("kv", "long_document")


def _prefer(q: DocumentQuestion | Knights | Arithmetic, winner: Fact, loser: Fact, draw: Draw) -> str:
    assert isinstance(q, DocumentQuestion) and q.rule
    latest = q.rule.name == "latest"
    mark = _year if latest else _source
    ways = phrases.PREFER_LATEST if latest else phrases.PREFER_TRUSTED
    return _upper(draw.pick(ways).format(a=mark(winner), b=mark(loser), v=name(winner.value)))


def _rule(q: DocumentQuestion, draw: Draw) -> str:
    assert q.rule
    if q.rule.name == "latest":
        return draw.pick(phrases.RULE_LATEST)
    order = ", ".join(name(Entity("source", s)) for s in q.rule.order)
    return draw.pick(phrases.RULE_TRUSTED).format(order=order)


def _said(fact: Fact, draw: Draw) -> str:
    dated = f" ({_source(fact)}, {_year(fact)})" if fact.year else ""
    said = draw.pick(phrases.SAID[fact.relation]).format(s=name(fact.subject), v=name(fact.value))
    return filler.articles(said) + dated


def _sentence(pattern: str, fact: Fact) -> str:
    return _upper(filler.articles(pattern.format(s=name(fact.subject), v=name(fact.value))))


def _knights_question(q: Knights) -> str:
    people = ", ".join(name(Entity("first", p)) for p in q.people)
    said = " ".join(f'{_person(q, i)} says: "{_statement(q, s)}"' for i, s in enumerate(q.says))
    return ("On an island everyone is a knight, who always tells the truth, or a knave, who always lies. "
            f"You meet {people}. {said} Who is what?")


def _statement(q: Knights, s: Statement) -> str:
    a, b = _person(q, s.a), _person(q, s.b) if s.b >= 0 else ""
    first, second = f"{a} is a {_role(s.role_a)}", f"{b} is a {_role(s.role_b)}"
    return {"is": f"{first}.", "same": f"{a} and {b} are of the same kind.",
            "differ": f"{a} and {b} are of different kinds.", "and": f"{first} and {second}.",
            "or": f"{first} or {second}."}[s.form]


def _roles(q: Knights, roles: tuple[bool, ...]) -> str:
    said = [f"{_person(q, i)} is a {_role(r)}" for i, r in enumerate(roles)]
    return ", ".join(said[:-1]) + f" and {said[-1]}"


def _role(knight: bool) -> str:
    return "knight" if knight else "knave"


def _held(q: Knights, s: Statement, roles: tuple[bool, ...]) -> str:
    """A statement, and the roles that those it names are supposed to have."""
    named = [s.a, s.b] if s.b >= 0 else [s.a]
    supposed = " and ".join(f"{_person(q, i)} a {_role(roles[i])}" for i in named)
    return f'"{_statement(q, s)}" Supposed: {supposed}.'


def _person(q: Knights, i: int) -> str:
    return name(Entity("first", q.people[i]))


def _year(f: Fact) -> str:
    return name(Entity("year", f.year - 1))


def _source(f: Fact) -> str:
    return name(Entity("source", f.source))


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]
