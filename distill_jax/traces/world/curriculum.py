"""The quickstart's data: what the base, the teacher and the students see, and what they are asked at the end.

A model that never looked anything up before takes thousands of steps to start; one that has recited documents takes
hundreds. So the shared base first recites: every fact of its documents in a random order, k look-ups in one row
(`recite`), beside plain look-ups. Then the teacher learns two-hop questions with oracle thinking, the students learn
from what the teacher wrote. Everything is a pure function of the seed; evaluation questions are of the `eval` split.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from distill_jax.traces.trace import Trace, simple_trace
from distill_jax.traces.world import compact, facts
from distill_jax.traces.world.draw import Draw
from distill_jax.traces.world.generate import WorldSpec, symbols, trace


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """ks: documents of a training question, drawn evenly; recited: share of base rows that recite."""

    seed: int = 0
    ks: tuple[int, ...] = (2, 4, 8)
    recited: float = 0.5

    def base(self, n: int) -> Iterator[Trace]:
        """Single-document look-ups, read and answered, and recitals."""
        for i in range(n):
            spec = WorldSpec(kind="lookup", k=self.ks[i % len(self.ks)], seed=self.seed)
            every = round(1 / self.recited) if self.recited else 0
            yield recite(spec, i) if every and (i // len(self.ks)) % every == 0 else trace(spec, i)

    def two_hop(self, n: int, salt: int = 1) -> Iterator[Trace]:
        """Two-hop questions with minimal oracle thinking; another salt gives other questions."""
        for i in range(n):
            yield trace(WorldSpec(kind="two_hop", k=self.ks[i % len(self.ks)], seed=self.seed * 1000 + salt), i)

    def evaluation(self, k: int, n: int) -> Iterator[Trace]:
        """n two-hop questions of the `eval` split with k documents, the answer at every position in turn."""
        spec = WorldSpec(kind="two_hop", k=k, seed=self.seed, split="eval")
        for i in range(n):
            yield trace(replace(spec, position=i % k), i)


def recite(spec: WorldSpec, index: int) -> Trace:
    """The documents of look-up question `index`, and all their facts in another order as the answer."""
    q = symbols(spec, index)
    assert isinstance(q, facts.DocumentQuestion)
    draw = Draw("recite", spec.seed, spec.k, index)
    docs = draw.shuffled(list(q.documents))
    text = " ".join(f"doc {compact.fact(d[0])}" for d in docs) + " ask all"
    said = " ".join(compact.fact(d[0]) for d in draw.shuffled(docs))
    return simple_trace(text, "", said, gold=said, verdict=True,
                        meta={"kind": "recite", "k": spec.k, "split": spec.split, "index": index})
