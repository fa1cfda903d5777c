"""Documents that contradict each other, with years, sources and a stated rule. Reported apart from plain reading."""

from dataclasses import dataclass

from distill_jax.eval.records import Item
from distill_jax.eval.tasks.world import world_items
from distill_jax.traces.world.generate import WorldSpec


@dataclass(frozen=True, kw_only=True)
class Conflicts:
    """Two or three of the k documents disagree on the answer; the record says by which rule (`latest`, `trusted`)."""

    k: tuple[int, ...] = (2, 4, 8)
    questions: int = 500
    positions: int = 3
    rendering: str = "compact"
    seed: int = 0

    @property
    def name(self) -> str:
        return "conflicts"

    def items(self) -> list[Item]:
        return [item for k in self.k for item in world_items(
            WorldSpec(kind="conflict", k=k, rendering=self.rendering, split="eval", seed=self.seed),
            self.questions, self.positions)]
