"""What a stage of a recipe is handed when it runs."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_jax.jobs import processes
from distill_jax.recipe import Recipe, resolve

Echo = Callable[[str], None]


def say(line: str) -> None:
    if processes.index() == 0:
        print(line, flush=True)


class Stopwatch:
    """Seconds spent in a stage over all starts, kept in a file; a killed start is not counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = json.loads(path.read_text())["seconds"] if path.is_file() else 0.0

    def __enter__(self) -> "Stopwatch":
        self.start = time.monotonic()
        return self

    @property
    def total(self) -> float:
        return self.before + time.monotonic() - self.start

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*([OSError] if kind else [])):  # a full disk has been said already
            write_json(self.path, {"seconds": self.total})


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; by the first process of a run."""
    if processes.index():
        return
    tmp = path.with_suffix(".tmp")
    try:
        tmp.write_text(json.dumps(value, indent=1))
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a stage may know: its recipe, where it writes, how it speaks, and how to find other stages' output."""

    recipe: Recipe
    folder: Path
    watch: Stopwatch
    say: Echo = field(default=say)

    def resolve(self, reference: str) -> str:
        return resolve(self.recipe, reference)

    @property
    def seed(self) -> int:
        return self.recipe.seed


class Stopped(Exception):
    """A stage was asked to stop (SIGTERM, Ctrl-C) and has saved what it had."""
