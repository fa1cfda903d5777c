"""Multi-document question answering: k documents by position of the gold one, with floor and ceiling."""

from collections.abc import Iterator
from dataclasses import dataclass

from distill_jax.eval.records import Item
from distill_jax.eval.tasks.ctxs import Question, read_questions
from distill_jax.eval.tasks.positions import spaced
from distill_jax.eval.tasks.world import world_items
from distill_jax.traces.world.facts import Layout
from distill_jax.traces.world.generate import WorldSpec
from distill_jax.traces.world.rich import closed_book_prompt, documents_prompt


@dataclass(frozen=True, kw_only=True)
class MultidocQA:
    """k documents, the gold one at several positions.

    data               "" for the generated world, or a file in the lost-in-the-middle form
    k                  numbers of documents; those beyond training show how reading extrapolates
    questions          per k
    positions          at most so many positions of the gold document per k, evenly spaced, ends included; 0: all
    floor_and_ceiling  also ask without documents (closed book) and with the gold ones alone (oracle), once per
                       question of the largest k
    kind, rendering, layout, names   of the generated world (`WorldSpec`)
    """

    data: str = ""
    k: tuple[int, ...] = (2, 4, 8)
    questions: int = 500
    positions: int = 5
    floor_and_ceiling: bool = True
    kind: str = "two_hop"
    rendering: str = "compact"
    layout: Layout = "random"
    names: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        return "multidoc_qa"

    def items(self) -> list[Item]:
        if self.data:
            return list(_file_items(self))
        out: list[Item] = []
        for k in self.k:
            shown = ("all", "gold", "none") if self.floor_and_ceiling and k == max(self.k) else ("all",)
            for setting in shown:
                spec = WorldSpec(kind=self.kind, k=k, rendering=self.rendering, layout=self.layout, split="eval",
                                 names=self.names, seed=self.seed, shown=setting)
                out += world_items(spec, self.questions, self.positions)
        return out

    def left_out(self) -> dict[str, int]:
        """What of a file was not asked or not shown, at the largest k; nothing for the generated world."""
        if not self.data:
            return {}
        _, dropped = read_questions(self.data, max(self.k), self.questions, self.seed)
        return {"rows without a usable answer": dropped.empty_gold,
                "distractors refused for holding an answer": dropped.leaks}


def _file_items(task: MultidocQA) -> Iterator[Item]:
    for k in task.k:
        questions, _ = read_questions(task.data, k, task.questions, task.seed)
        for q in questions:
            for p in spaced(list(range(k)), task.positions):
                yield _item(q, documents_prompt(q.question, q.shown([p], k)), k=k, position=p, setting="all")
            if task.floor_and_ceiling and k == max(task.k):
                yield _item(q, documents_prompt(q.question, q.shown([0], 1)), k=k, setting="gold")
                yield _item(q, closed_book_prompt(q.question), k=k, setting="none")


def _item(q: Question, prompt: str, **axes: int | str) -> Item:
    where = "-".join(str(v) for v in axes.values())
    return Item(id=f"{q.id}-{where}", group=q.id, question=prompt, golds=q.golds, axes=axes)
