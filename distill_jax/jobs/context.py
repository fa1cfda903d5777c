"""What a stage of a recipe is handed when it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distill_jax.recipe import Recipe, resolve

Echo = Callable[[str], None]


def say(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a stage may know: its recipe, where it writes, how it speaks, and how to find other stages' output."""

    recipe: Recipe
    folder: Path
    say: Echo = field(default=say)

    def resolve(self, reference: str) -> str:
        return resolve(self.recipe, reference)

    @property
    def seed(self) -> int:
        return self.recipe.seed


class Stopped(Exception):
    """A stage was asked to stop (SIGTERM, Ctrl-C) and has saved what it had."""
