"""Integration over documents: the gold documents of a question adjacent, spread or in reversed order."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_jax.eval.grade import normalise, usable_golds
from distill_jax.eval.records import Item
from distill_jax.eval.tasks.ctxs import Passage, Question
from distill_jax.eval.tasks.positions import spaced
from distill_jax.eval.tasks.world import world_items
from distill_jax.traces.formats import read_rows
from distill_jax.traces.world.generate import WorldSpec
from distill_jax.traces.world.rich import documents_prompt

LAYOUTS = ("adjacent", "reversed", "spread")


@dataclass(frozen=True, kw_only=True)
class Multihop:
    """The same questions with their gold documents laid out in three ways.

    data       "" for two-hop questions of the generated world, or a HotpotQA-distractor file (`context` of titles
               and sentences, `supporting_facts`); documents beyond its own come from other questions
    layouts    adjacent: in hop order, next to each other, the last at `position`; reversed: the last hop first;
               spread: evenly from the first place to the last
    """

    data: str = ""
    k: tuple[int, ...] = (4, 8)
    questions: int = 500
    positions: int = 3
    layouts: tuple[str, ...] = LAYOUTS
    rendering: str = "compact"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.layouts) - set(LAYOUTS)
        if unknown:
            raise ValueError(f"unknown layouts {sorted(unknown)}; known: {list(LAYOUTS)}")

    @property
    def name(self) -> str:
        return "multihop"

    def items(self) -> list[Item]:
        if self.data:
            return list(_hotpot_items(self))
        out: list[Item] = []
        for k in self.k:
            for layout in self.layouts:
                spec = WorldSpec(kind="two_hop", k=k, rendering=self.rendering, layout=layout,  # type: ignore[arg-type]
                                 split="eval", seed=self.seed)
                out += world_items(spec, self.questions, self.positions)
        return out


def slots(layout: str, k: int, hops: int, position: int) -> list[int]:
    """Places of the gold documents in hop order; `position` is the place of the last hop (ignored by `spread`).

    >>> slots("adjacent", 10, 3, 4), slots("reversed", 10, 3, 4), slots("spread", 10, 3, 4)
    ([2, 3, 4], [6, 5, 4], [0, 4, 9])
    """
    if layout == "adjacent":
        return list(range(position - hops + 1, position + 1))
    if layout == "reversed":
        return list(range(position + hops - 1, position - 1, -1))
    return [i * (k - 1) // max(1, hops - 1) for i in range(hops)]


def last_hop_places(layout: str, k: int, hops: int) -> list[int]:
    """Places the last hop can take."""
    if layout == "spread":
        return [k - 1]
    return list(range(hops - 1, k)) if layout == "adjacent" else list(range(k - hops + 1))


def _hotpot_items(task: Multihop) -> Iterator[Item]:
    rows = list(read_rows(task.data))
    if not {"question", "answer", "context", "supporting_facts"} <= set(rows[0]):
        raise ValueError(f"{task.data} is no HotpotQA-distractor file: rows have {sorted(rows[0])}, expected "
                         "question, answer, context, supporting_facts")
    pool = [p for row in rows for p in _passages(row)]
    for i, row in enumerate(rows[:task.questions]):
        if not usable_golds([row["answer"]]):
            continue
        q = _question(i, row, pool, max(task.k), random.Random(f"{task.seed}/{i}"))
        for k in task.k:
            if len(q.gold) > k:
                raise ValueError(f"{task.data}, row {i}: {len(q.gold)} gold documents do not fit into k={k}")
            for layout in task.layouts:
                for p in spaced(last_hop_places(layout, k, len(q.gold)), task.positions):
                    docs = q.shown(slots(layout, k, len(q.gold), p), k)
                    yield Item(id=f"{i}-{k}-{layout}-{p}", group=str(i), golds=q.golds, kind="exact",
                               question=documents_prompt(q.question, docs),
                               axes={"k": k, "position": p, "layout": layout, "setting": "all"})


def _question(i: int, row: Mapping[str, Any], pool: Sequence[Passage], k: int, rng: random.Random) -> Question:
    titles = list(dict.fromkeys(row["supporting_facts"]["title"]))
    own = _passages(row)
    gold = [next(p for p in own if p.title == t) for t in titles]
    distractors = [p for p in own if p.title not in titles]
    needle = normalise(row["answer"])
    # `yes`, `no` and the like are in many texts: they leak nothing.
    leaks = lambda p: len(needle) > 3 and needle in normalise(f"{p.title} {p.text}")
    taken = {p.title for p in own}
    for j in rng.sample(range(len(pool)), len(pool)):
        if len(distractors) >= k:
            break
        if pool[j].title not in taken and not leaks(pool[j]):
            distractors.append(pool[j])
            taken.add(pool[j].title)
    return Question(id=str(i), question=row["question"], golds=(row["answer"],), gold=tuple(gold),
                    distractors=tuple(distractors))


def _passages(row: Mapping[str, Any]) -> list[Passage]:
    c = row["context"]
    return [Passage(title=t, text="".join(s).strip()) for t, s in zip(c["title"], c["sentences"], strict=True)]
