"""Documents of varying length: one to three facts each; accuracy by the length of the gold one as well."""

from dataclasses import dataclass

from distill_jax.eval.records import Item
from distill_jax.eval.tasks.world import world_items
from distill_jax.traces.world.generate import WorldSpec


@dataclass(frozen=True, kw_only=True)
class VariedLength:
    """Look-up among documents of unequal length."""

    k: tuple[int, ...] = (2, 4, 8)
    questions: int = 500
    positions: int = 3
    rendering: str = "compact"
    seed: int = 0

    @property
    def name(self) -> str:
        return "varied_length"

    def items(self) -> list[Item]:
        return [item for k in self.k for item in world_items(
            WorldSpec(kind="varied", k=k, rendering=self.rendering, split="eval", seed=self.seed),
            self.questions, self.positions)]
