"""How a long job speaks: a bar on a terminal, a plain line now and then elsewhere. Always on stderr."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

EVERY = 10.0
"""Seconds between plain lines."""


class Ticker:
    """`with Ticker("import") as t: t.at(120, "98 kept")`. `total` is None where nobody knows it."""

    def __init__(self, name: str, total: int | None = None, console: Console | None = None) -> None:
        self.name, self.total = name, total
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last = time.monotonic()

    def __enter__(self) -> "Ticker":
        if self.console.is_terminal:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=self.console)
            self._task = self._bar.add_task(self.name, total=self.total, note="")
            self._bar.start()
        return self

    def at(self, done: int, note: str = "") -> None:
        """`done` units are finished; shown at once on a terminal, every `EVERY` seconds elsewhere."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            self.say(f"{done:,}{'' if self.total is None else f'/{self.total:,}'}  {note}")

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True, markup=False)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
