"""Independent solvers: they read the printed question, nothing of the generator."""

import itertools
import re

from distill_jax.traces.world import phrases


def compact_documents(text: str) -> str:
    """Answer of a compact document question: parse the facts, apply the rule, walk the path."""
    body, ask = text.split(" ask ")
    *path, subject = ask.split()
    order = None
    if " rule " in body:
        body, rule = body.split(" rule ")
        order = rule.split()[1:] if rule.startswith("trust") else ["latest"]
    edges: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for doc in body.removeprefix("doc ").split(" doc "):
        for sentence in doc.split(" ; "):
            relation, who, *rest = sentence.split()
            rest = [relation, *rest]
            while rest and rest[0] in ("lives", "grows", "works", "owns"):
                tail = rest[2:4] if len(rest) > 2 and rest[2].isdigit() else []
                edges.setdefault((who, rest[0]), []).append((rest[1], *tail))
                rest = rest[2 + len(tail):]
            assert not rest, sentence
    at = subject
    for relation in reversed(path):
        found = edges[at, relation]
        if order == ["latest"]:
            found = [max(found, key=lambda f: int(f[1]))]
        elif order:
            found = [min(found, key=lambda f: order.index(f[2]))]
        assert len(found) == 1, f"{at} {relation} is not unique: {found}"
        at = found[0][0]
    return at


def compact_kv(text: str) -> str:
    pairs, key = text.split(" ask ")
    table = dict(p.split(" : ") for p in pairs.split(" ; "))
    assert len(table) == pairs.count(":")
    return table[key]


def compact_knights(text: str) -> str:
    """Brute force over roles on the parsed statements; the solution must be unique."""
    said = [s.split(" says ") for s in text.removesuffix(" ask knight or knave").split(" ; ")]
    people = [p for p, _ in said]

    def holds(statement: str, roles: dict[str, str]) -> bool:
        w = statement.split()
        if w[1] == "is":
            return roles[w[0]] == w[2]
        if w[1] in ("same", "differ"):
            return (roles[w[0]] == roles[w[2]]) == (w[1] == "same")
        a, b = roles[w[0]] == w[1], roles[w[3]] == w[4]
        return a and b if w[2] == "and" else a or b

    fits = []
    for combination in itertools.product(("knight", "knave"), repeat=len(people)):
        roles = dict(zip(people, combination, strict=True))
        if all(holds(s, roles) == (roles[p] == "knight") for p, s in said):
            fits.append(" ".join(f"{p} {roles[p]}" for p in people))
    assert len(fits) == 1, fits
    return fits[0]


def compact_arithmetic(text: str) -> str:
    a, op, b = re.fullmatch(r"ask ([\d ]+) (plus|minus|times) ([\d ]+)", text).groups()
    a, b = int(a.replace(" ", "")), int(b.replace(" ", ""))
    return " ".join(str({"plus": a + b, "minus": a - b, "times": a * b}[op]))


def rich_arithmetic(text: str) -> str:
    a, op, b = re.search(r"(\d+) ([-+*]) (\d+)", text).groups()
    return str({"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op])


def rich_knights(text: str) -> str:
    said = re.findall(r'(\w+) says: "([^"]*)"', text)
    people = [p for p, _ in said]

    def holds(statement: str, roles: dict[str, str]) -> bool:
        claims = [roles[p] == r for p, r in re.findall(r"(\w+) is a (knight|knave)", statement)]
        if not claims:
            a, b = re.match(r"(\w+) and (\w+) are", statement).groups()
            return (roles[a] == roles[b]) == ("the same kind" in statement)
        return any(claims) if " or " in statement else all(claims)

    fits = []
    for combination in itertools.product(("knight", "knave"), repeat=len(people)):
        roles = dict(zip(people, combination, strict=True))
        if all(holds(s, roles) == (roles[p] == "knight") for p, s in said):
            fits.append([f"{p} is a {roles[p]}" for p in people])
    assert len(fits) == 1, fits
    return ", ".join(fits[0][:-1]) + " and " + fits[0][-1]


def _fact_patterns() -> list[tuple[str, re.Pattern[str]]]:
    out = []
    for relation, ways in phrases.FACT.items():
        for way in ways:
            p = re.escape(way).replace(r"\{s\}", "(?P<s>[A-Z][a-z]+(?: [A-Z][a-z]+)?)").replace(
                r"\{v\}", "(?P<v>[A-Za-z]+)").replace(r"\ a\ (?P<v>", r"\ an?\ (?P<v>")
            if relation in ("grows", "works", "owns"):
                p = re.sub(r"^\(\?P<v>\[A-Za-z\]\+\)", "(?P<v>[A-Z][a-z]+)", p)
            out.append((relation, re.compile(p)))
    return out


def rich_facts(text: str) -> set[tuple[str, str, str]]:
    """(subject, relation, value) of every sentence of the documents that states a fact."""
    found = set()
    for sentence in re.findall(r"[^.]+\.", text):
        for relation, pattern in _fact_patterns():
            m = pattern.fullmatch(sentence.strip())
            if m:
                value = m["v"] if relation == "lives" else m["v"].lower()
                found.add((m["s"], relation, value))
    return found


def rich_documents(text: str, path: list[str]) -> str:
    """Answer of a rich document question without conflicts. `path`: the relations asked for."""
    docs, ask = text.split("\n\nQuestion: ")
    bodies = re.sub(r"Document \[\d+\]\(Title: [^)]*\) ", "", docs.split("\n\n", 1)[1].removeprefix("Document: "))
    table: dict[tuple[str, str], set[str]] = {}
    for s, r, v in rich_facts(bodies.replace("\n", " ")):
        table.setdefault((s, r), set()).add(v)
    at = max((s for s, _ in table if s in ask), key=len)
    for relation in path:
        (at,) = table[at, relation]
    return at
