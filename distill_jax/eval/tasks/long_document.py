"""One document that grows: k sentences (or k passages run together), the one that answers at several depths."""

from collections.abc import Iterator
from dataclasses import dataclass

from distill_jax.eval.records import Item
from distill_jax.eval.tasks.ctxs import read_questions
from distill_jax.eval.tasks.positions import spaced
from distill_jax.eval.tasks.world import world_items
from distill_jax.traces.world.generate import WorldSpec
from distill_jax.traces.world.rich import single_document_prompt


@dataclass(frozen=True, kw_only=True)
class LongDocument:
    """data: "" for the generated world, or a lost-in-the-middle file whose passages become one document."""

    data: str = ""
    k: tuple[int, ...] = (2, 4, 8, 16)
    questions: int = 500
    positions: int = 5
    rendering: str = "compact"
    seed: int = 0

    @property
    def name(self) -> str:
        return "long_document"

    @property
    def unit(self) -> str:
        return "passages" if self.data else "sentences"

    def items(self) -> list[Item]:
        if self.data:
            return list(_file_items(self))
        return [item for k in self.k for item in world_items(
            WorldSpec(kind="long_document", k=k, rendering=self.rendering, split="eval", seed=self.seed),
            self.questions, self.positions)]


def _file_items(task: LongDocument) -> Iterator[Item]:
    for k in task.k:
        for q in read_questions(task.data, k, task.questions, task.seed)[0]:
            for p in spaced(list(range(k)), task.positions):
                text = " ".join(text for _, text in q.shown([p], k))
                yield Item(id=f"{q.id}-{k}-{p}", group=q.id, question=single_document_prompt(q.question, text),
                           golds=q.golds, axes={"k": k, "position": p, "setting": "all"})
