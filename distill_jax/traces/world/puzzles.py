"""Knights and Knaves and multi-digit arithmetic, as symbols."""

import itertools
from dataclasses import dataclass
from typing import Literal

from distill_jax.traces.world.draw import Draw

Form = Literal["is", "same", "differ", "and", "or"]
FORMS: tuple[Form, ...] = ("is", "same", "differ", "and", "or")


@dataclass(frozen=True)
class Statement:
    """What one person says. `role_a` / `role_b`: True for knight.

    is      a has role_a                       same / differ   a and b have equal / different roles
    and     a has role_a and b has role_b      or              at least one of the two
    """

    form: Form
    a: int
    role_a: bool = True
    b: int = -1
    role_b: bool = True

    def holds(self, roles: tuple[bool, ...]) -> bool:
        first = roles[self.a] == self.role_a
        if self.form == "is":
            return first
        if self.form in ("same", "differ"):
            return (roles[self.a] == roles[self.b]) == (self.form == "same")
        second = roles[self.b] == self.role_b
        return (first and second) if self.form == "and" else (first or second)


@dataclass(frozen=True)
class Knights:
    """`people[i]` (an index into the names) says `says[i]`; `roles[i]` is True for a knight, who tells the truth."""

    people: tuple[int, ...]
    says: tuple[Statement, ...]
    roles: tuple[bool, ...]
    kind: str = "knights"

    def first_failure(self, roles: tuple[bool, ...]) -> int | None:
        """The first person whose statement does not fit the supposed roles, None when all fit."""
        return next((i for i, s in enumerate(self.says) if s.holds(roles) != roles[i]), None)

    def canonical(self) -> str:
        """The puzzle up to renaming: two puzzles that differ only in who is called what are one question."""
        n = len(self.says)
        return min(f"{self.kind}|{self._renamed(p)}" for p in itertools.permutations(range(n)))

    def _renamed(self, new: tuple[int, ...]) -> str:
        said = []
        for speaker, s in enumerate(self.says):
            pair = sorted([(new[s.a], s.role_a)] + ([(new[s.b], s.role_b)] if s.b >= 0 else []))
            said.append((new[speaker], s.form, pair))
        return str(sorted(said))


def solutions(says: tuple[Statement, ...]) -> list[tuple[bool, ...]]:
    """Every assignment of roles in which knights speak the truth and knaves do not."""
    return [r for r in itertools.product((True, False), repeat=len(says))
            if all(s.holds(r) == r[i] for i, s in enumerate(says))]


def knights(draw: Draw, names: int, k: int) -> Knights:
    """k people, one statement each, exactly one solution."""
    if not 2 <= k <= min(6, names):
        raise ValueError(f"Knights and Knaves takes 2 to {min(6, names)} people, got k={k}")
    while True:
        says = tuple(_statement(draw, i, k) for i in range(k))
        found = solutions(says)
        if len(found) == 1:
            return Knights(people=tuple(draw.distinct(names, k)), says=says, roles=found[0])


def _statement(draw: Draw, speaker: int, k: int) -> Statement:
    form = draw.pick(FORMS)
    others = [i for i in range(k) if i != speaker]
    a = draw.pick(others)
    if form == "is":
        return Statement(form, a, draw.chance(0.5))
    b = draw.pick([i for i in range(k) if i != a])
    if form in ("same", "differ"):
        return Statement(form, a, True, b, True)
    return Statement(form, a, draw.chance(0.5), b, draw.chance(0.5))


Op = Literal["plus", "minus", "times"]
OPS: tuple[Op, ...] = ("plus", "minus", "times")


@dataclass(frozen=True)
class Arithmetic:
    """`a op b` with a >= b for minus; `times` has a one-digit b."""

    op: Op
    a: int
    b: int
    kind: str = "arithmetic"

    @property
    def value(self) -> int:
        return {"plus": self.a + self.b, "minus": self.a - self.b, "times": self.a * self.b}[self.op]

    def canonical(self) -> str:
        pair = (self.a, self.b) if self.op == "minus" else tuple(sorted((self.a, self.b)))
        return f"{self.kind}|{self.op}|{pair}"


@dataclass(frozen=True)
class Column:
    """One digit column, from the right: top op bottom with the carry (or borrow) in gives digit and carry out."""

    top: int
    bottom: int
    carry: int
    digit: int
    carry_out: int


def columns(q: Arithmetic) -> list[Column]:
    """School arithmetic column by column. The last carry is the leading digit(s) of plus and times."""
    out: list[Column] = []
    carry = 0
    top, bottom = digits(q.a), digits(q.b)
    for i in range(max(len(top), len(bottom)) if q.op != "times" else len(top)):
        t = top[i] if i < len(top) else 0
        b = bottom[0] if q.op == "times" else (bottom[i] if i < len(bottom) else 0)
        total = {"plus": t + b + carry, "minus": t - b - carry, "times": t * b + carry}[q.op]
        after = int(total < 0) if q.op == "minus" else total // 10
        out.append(Column(t, b, carry, total % 10, after))
        carry = after
    return out


def digits(n: int) -> list[int]:
    """Decimal digits, lowest first."""
    return [int(c) for c in reversed(str(n))]


def arithmetic(draw: Draw, k: int) -> Arithmetic:
    """Operands of k digits (the second factor of a product has one)."""
    if not 1 <= k <= 12:
        raise ValueError(f"arithmetic takes k = 1 to 12 digits, got {k}")
    op = draw.pick(OPS)
    number = lambda n: draw.below(9 * 10 ** (n - 1)) + 10 ** (n - 1)
    a, b = number(k), number(1 if op == "times" else k)
    return Arithmetic(op, max(a, b), min(a, b)) if op == "minus" else Arithmetic(op, a, b)
