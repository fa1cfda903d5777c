"""The quickstart's data: what the base, the teacher and the students see.

A small model that has never looked anything up stays at chance for thousands of updates: before its attention layers
work together, none is of use. Two documents and few names make the step small enough to be taken in about a hundred
updates; from there more documents and more names follow at once, in both relations (docs/LOG.md). So the base's
look-ups come in lessons. Then the teacher learns two-hop questions with oracle thinking, and the students learn from
what the teacher wrote. Everything is a pure function of the seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from distill_jax.traces.trace import Trace
from distill_jax.traces.world.generate import WorldSpec, trace
from distill_jax.traces.world.thoughts import Style


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Single-document look-ups over `ks` documents (drawn evenly) with `names` names of each type."""

    ks: tuple[int, ...]
    names: int


NAMES = 16
"""Names of each type in the two-hop questions, of training and of evaluation."""

LESSONS = (
    Lesson(ks=(2,), names=4), Lesson(ks=(2, 4), names=6), Lesson(ks=(2, 4, 6), names=8),
    Lesson(ks=(2, 4, 6, 8), names=NAMES))
"""From the easiest to all that the two-hop questions need."""


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """ks: documents of a two-hop training question, drawn evenly; style: of its oracle thinking. See `WorldSpec`."""

    seed: int = 0
    ks: tuple[int, ...] = (2, 4, 8)
    rendering: str = "compact"
    style: Style = "minimal"

    def lesson(self, number: int, n: int) -> Iterator[Trace]:
        """n look-ups of lesson `number` of LESSONS, each read (`thinking`) and answered."""
        lesson = LESSONS[number]
        for i in range(n):
            yield trace(WorldSpec(kind="same_relation", k=lesson.ks[i % len(lesson.ks)], names=lesson.names,
                                  rendering=self.rendering, seed=self.seed * 1000 + number), i)

    def two_hop(self, n: int, salt: int = 1) -> Iterator[Trace]:
        """Two-hop questions with oracle thinking; another salt gives other questions."""
        for i in range(n):
            yield trace(WorldSpec(kind="two_hop", k=self.ks[i % len(self.ks)], names=NAMES,
                                  rendering=self.rendering, style=self.style, seed=self.seed * 1000 + salt), i)
