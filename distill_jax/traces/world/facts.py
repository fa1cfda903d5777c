"""Questions over documents, as symbols: what is true, what is asked, which documents hold the answer.

Nothing here knows how a document reads; `compact.py` and `rich.py` print these symbols. A question is built in two
steps: the facts (which decide its identity and its split) and the order of the documents (which does not), so one
question can be laid out with its gold document at every position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from distill_jax.traces.world.draw import Draw

Layout = Literal["random", "adjacent", "reversed", "spread"]
LAYOUTS: tuple[Layout, ...] = ("random", "adjacent", "reversed", "spread")


class Entity(NamedTuple):
    """The `index`-th person, city, good, ... of a lexicon."""

    type: str
    index: int


RELATIONS: Mapping[str, tuple[str, str]] = {
    "lives": ("person", "city"),
    "grows": ("city", "good"),
    "works": ("person", "job"),
    "owns": ("person", "pet"),
    "opens": ("key", "value"),  # key-value retrieval
}
"""relation -> (type of its subject, type of its value)"""


@dataclass(frozen=True)
class Fact:
    """`subject relation value`; `year` and `source` are 0 where a document does not say them."""

    subject: Entity
    relation: str
    value: Entity
    year: int = 0
    source: int = -1


@dataclass(frozen=True)
class Rule:
    """Which of several conflicting documents counts: the `latest`, or the most `trusted` source of `order`."""

    name: Literal["latest", "trusted"]
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class DocumentQuestion:
    """Documents (each a tuple of facts), a query and the documents that answer it.

    subject, path   ask for the end of the path of relations from the subject
    gold            indices of the documents of each hop, in hop order; the last one holds the answer
    value           the answer
    """

    kind: str
    documents: tuple[tuple[Fact, ...], ...]
    subject: Entity
    path: tuple[str, ...]
    gold: tuple[int, ...]
    value: Entity
    rule: Rule | None = None

    @property
    def answer_fact(self) -> Fact:
        """The fact that holds the answer."""
        return next(f for f in self.documents[self.gold[-1]] if f.relation == self.path[-1] and f.value == self.value)

    def hop_facts(self) -> list[tuple[int, Fact]]:
        """(document, fact) of each hop."""
        out, at = [], self.subject
        for doc, relation in zip(self.gold[:-1], self.path[:-1], strict=True):
            fact = next(f for f in self.documents[doc] if f.subject == at and f.relation == relation)
            out.append((doc, fact))
            at = fact.value
        return [*out, (self.gold[-1], self.answer_fact)]

    def canonical(self) -> str:
        """Identity of the question: independent of the order of documents and of their wording."""
        docs = sorted(";".join(sorted(map(_key, doc))) for doc in self.documents)
        rule = f"{self.rule.name}{self.rule.order}" if self.rule else ""
        return "|".join([self.kind, *docs, f"{self.subject}{self.path}", rule])


def _key(f: Fact) -> str:
    return f"{f.subject.type}{f.subject.index}.{f.relation}.{f.value.type}{f.value.index}.{f.year}.{f.source}"


Sizes = Mapping[str, int]
"""Number of entities of each type that a lexicon can name."""


def _entities(draw: Draw, sizes: Sizes, type_: str, count: int) -> list[Entity]:
    if count > sizes[type_]:
        raise ValueError(f"the question needs {count} different {type_} names and this rendering has {sizes[type_]}: "
                         "use fewer documents, or rendering='rich'")
    return [Entity(type_, i) for i in draw.distinct(sizes[type_], count)]


def _edges(draw: Draw, sizes: Sizes, relation: str, count: int) -> list[Fact]:
    """`count` facts of one relation with different subjects and different values."""
    subject, value = RELATIONS[relation]
    pairs = zip(_entities(draw, sizes, subject, count), _entities(draw, sizes, value, count), strict=True)
    return [Fact(s, relation, v) for s, v in pairs]


def _chains(draw: Draw, sizes: Sizes, k: int) -> list[Fact]:
    """k facts: k // 2 chains person -> city -> good (each a pair of neighbours) and one loose fact if k is odd."""
    lives = _edges(draw, sizes, "lives", (k + 1) // 2)
    goods = _entities(draw, sizes, "good", k // 2)
    out: list[Fact] = []
    for home, good in zip(lives, goods, strict=False):
        out += [home, Fact(home.value, "grows", good)]
    return out + lives[k // 2:]


def lookup(draw: Draw, sizes: Sizes, k: int) -> DocumentQuestion:
    """One document answers: who lives where, which city grows what."""
    facts = _chains(draw, sizes, k) if k > 1 else _edges(draw, sizes, draw.pick(["lives", "grows"]), 1)
    gold = draw.below(k)
    return _ask("lookup", [(f,) for f in facts], (gold,), (facts[gold].relation,))


def same_relation(draw: Draw, sizes: Sizes, k: int) -> DocumentQuestion:
    """Look-up among documents of one relation: nothing but the subject tells them apart, so that chance is 1 in k."""
    facts = _edges(draw, sizes, draw.pick(["lives", "grows"]), k)
    gold = draw.below(k)
    return _ask("same_relation", [(f,) for f in facts], (gold,), (facts[gold].relation,))


def two_hop(draw: Draw, sizes: Sizes, k: int) -> DocumentQuestion:
    """What does the city grow in which a person lives? Every distractor is a link of another such chain."""
    if k < 2:
        raise ValueError(f"a two-hop question needs k >= 2 documents, got {k}")
    facts = _chains(draw, sizes, k)
    chain = draw.below(k // 2)
    return _ask("two_hop", [(f,) for f in facts], (2 * chain, 2 * chain + 1), ("lives", "grows"))


def conflict(draw: Draw, sizes: Sizes, k: int) -> DocumentQuestion:
    """Documents disagree on where a person lives; years, sources and a stated rule decide."""
    if k < 2:
        raise ValueError(f"a conflict needs k >= 2 documents, got {k}")
    rival = 2 if k < 4 else 2 + draw.below(2)  # documents about the person asked for
    sources = draw.shuffled(range(sizes["source"]))
    rule = Rule("trusted", tuple(sources)) if draw.chance(0.5) else Rule("latest")
    people = _entities(draw, sizes, "person", 1 + -(-(k - rival) // 2))
    facts: list[Fact] = []
    for person, count in [(people[0], rival), *((p, 2) for p in people[1:])]:
        cities = _entities(draw, sizes, "city", count)
        years = draw.distinct(sizes["year"], count)
        order = draw.distinct(sizes["source"], count)
        facts += [Fact(person, "lives", c, y + 1, s) for c, y, s in zip(cities, years, order, strict=True)]
    facts = facts[:k]
    if rule.name == "latest":
        winner = max(range(rival), key=lambda i: facts[i].year)
    else:
        winner = min(range(rival), key=lambda i: rule.order.index(facts[i].source))
    return replace(_ask("conflict", [(f,) for f in facts], (winner,), ("lives",)), rule=rule)


def varied(draw: Draw, sizes: Sizes, k: int) -> DocumentQuestion:
    """Look-up in documents of one to three facts about one person each."""
    people = _entities(draw, sizes, "person", k)
    columns = {r: _entities(draw, sizes, RELATIONS[r][1], k) for r in ("lives", "works", "owns")}
    docs = []
    for i, person in enumerate(people):
        relations = [list(columns)[j] for j in draw.distinct(len(columns), 1 + draw.below(len(columns)))]
        docs.append(tuple(Fact(person, r, columns[r][i]) for r in relations))
    gold = draw.below(k)
    return _ask("varied", docs, (gold,), (draw.pick(docs[gold]).relation,))


def long_document(draw: Draw, sizes: Sizes, k: int) -> DocumentQuestion:
    """Look-up in one document of k sentences. Until printed, each sentence is its own document here."""
    return replace(lookup(draw, sizes, k), kind="long_document")


def kv(draw: Draw, sizes: Sizes, k: int) -> DocumentQuestion:
    """The value of one key among k."""
    facts = _edges(draw, sizes, "opens", k)
    gold = draw.below(k)
    return _ask("kv", [(f,) for f in facts], (gold,), ("opens",))


def _ask(kind: str, docs: list[tuple[Fact, ...]], gold: tuple[int, ...], path: tuple[str, ...]) -> DocumentQuestion:
    first = next(f for f in docs[gold[0]] if f.relation == path[0])
    last = next(f for f in docs[gold[-1]] if f.relation == path[-1])
    return DocumentQuestion(kind=kind, documents=tuple(docs), subject=first.subject, path=path, gold=gold,
                            value=last.value)


BUILDERS: Mapping[str, Callable[[Draw, Sizes, int], DocumentQuestion]] = {
    "lookup": lookup, "same_relation": same_relation, "two_hop": two_hop, "conflict": conflict, "varied": varied,
    "long_document": long_document, "kv": kv,
}


def positions(k: int, hops: int, layout: Layout) -> list[int]:
    """Positions (from 0) that the document with the answer can take."""
    if layout == "random" or hops == 1:
        return list(range(k))
    return {"adjacent": list(range(1, k)), "reversed": list(range(k - 1)), "spread": [k - 1]}[layout]


def lay_out(q: DocumentQuestion, draw: Draw, position: int | None, layout: Layout = "random") -> DocumentQuestion:
    """The documents in the order they are shown, with the one that holds the answer at `position`.

    The order of the distractors and (layout `random`) the place of the first hop relative to them depend on `draw`
    alone, so the same draw with another position moves nothing else.
    """
    k, hops = len(q.documents), len(q.gold)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {list(LAYOUTS)}")
    order = draw.shuffled([i for i in range(k) if i not in q.gold])
    first = draw.below(k - 1) if hops == 2 else 0
    allowed = positions(k, hops, layout)
    last = draw.pick(allowed) if position is None else position
    if last not in allowed:
        raise ValueError(f"gold position {last} is impossible with k={k}, layout={layout!r}; possible: {allowed}")
    slots = [last]
    if hops == 2:
        near = {"random": first + (first >= last), "adjacent": last - 1, "reversed": last + 1, "spread": 0}
        slots = [near[layout], last]
    for slot, doc in sorted(zip(slots, q.gold, strict=True)):
        order.insert(slot, doc)
    return replace(q, documents=tuple(q.documents[i] for i in order), gold=tuple(order.index(i) for i in q.gold))


def only_gold(q: DocumentQuestion) -> DocumentQuestion:
    """The oracle setting: the gold documents alone, in the order they stood in."""
    keep = sorted(q.gold)
    return replace(q, documents=tuple(q.documents[i] for i in keep), gold=tuple(keep.index(i) for i in q.gold))


def without_documents(q: DocumentQuestion) -> DocumentQuestion:
    """The closed-book setting: the question alone."""
    return replace(q, documents=(), gold=())
