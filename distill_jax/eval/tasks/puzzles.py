"""Knights and Knaves and multi-digit arithmetic of the generated world, by size."""

from dataclasses import dataclass

from distill_jax.eval.records import Item
from distill_jax.eval.tasks.world import world_items
from distill_jax.traces.world.generate import WorldSpec


@dataclass(frozen=True, kw_only=True)
class Puzzles:
    """kind: `knights` (k people) or `arithmetic` (k digits); names: of people that occur, None: all."""

    kind: str = "knights"
    k: tuple[int, ...] = (2, 3, 4)
    questions: int = 500
    rendering: str = "compact"
    seed: int = 0
    names: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("knights", "arithmetic"):
            raise ValueError(f"unknown puzzles {self.kind!r}; known: knights, arithmetic")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def unit(self) -> str:
        return {"knights": "people", "arithmetic": "digits"}[self.kind]

    def items(self) -> list[Item]:
        return [item for k in self.k for item in world_items(
            WorldSpec(kind=self.kind, k=k, rendering=self.rendering, split="eval", seed=self.seed, names=self.names),
            self.questions, 1, kind="exact")]
