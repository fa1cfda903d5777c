"""Where numbers go: JSON lines, TensorBoard, W&B where it is there, and a progress bar or plain lines."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Values = Mapping[str, float]

FORMATS = {
    "loss": "loss {:.4g}", "grad_norm": "|g| {:.3g}", "tokens_per_second": "{:,.0f} tok/s", "mfu": "MFU {:.1%}",
    "retained": "retained {:.1%}", "memory_gib": "{:.1f} GiB", "skipped": "{:.0f} skipped",
}
"""How the numbers that a person follows are shown, in this order; terms come after the loss."""


class Sink(Protocol):
    def write(self, step: int, values: Values) -> None: ...
    def close(self) -> None: ...


class Reporter:
    """Metrics of one stage, written into `folder` by process 0; elsewhere every method does nothing.

    total   updates of the stage
    terms   names of the objective's terms, shown beside the loss
    """

    def __init__(self, folder: str | Path, *, total: int, name: str = "train", terms: tuple[str, ...] = (),
                 writes: bool = True, console: Console | None = None) -> None:
        self.folder, self.total, self.name, self.terms, self.writes = Path(folder), total, name, terms, writes
        self.console = console or Console()
        self._sinks: list[Sink] = []
        self._bar: Progress | None = None
        self._start, self._since = time.monotonic(), 0

    def start(self, since: int) -> None:
        """Open everything; `since` is the number of updates already done."""
        self.restart_clock(since)
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sinks = [JsonLines(self.folder / f"{self.name}.jsonl", since), TensorBoard(self.folder, since)]
        if importlib.util.find_spec("wandb") and (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")):
            self._sinks.append(WandB(self.folder, self.name))
        if self.console.is_terminal:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console)
            self._bar.add_task(self.name, total=self.total, completed=since, note="")
            self._bar.start()

    def restart_clock(self, since: int) -> None:
        """The time left is reckoned from here on."""
        self._start, self._since = time.monotonic(), since

    def report(self, step: int, values: Values) -> None:
        """Numbers after `step` updates: all are written, those of FORMATS and the terms are shown."""
        self.write(step, values)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, note=self._note(values))
        else:
            self.say(f"{step}/{self.total}  {self._note(values)}{self._left(step)}")

    def write(self, step: int, values: Values) -> None:
        """Numbers after `step` updates, shown nowhere."""
        for sink in self._sinks:
            sink.write(step, values)

    def say(self, text: str) -> None:
        """One line for the reader, above the bar where there is one."""
        if self.writes:
            self.console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        if self._bar:
            self._bar.stop()
        self._sinks, self._bar = [], None

    def _note(self, values: Values) -> str:
        names = ["loss", *(t for t in self.terms if len(self.terms) > 1), *list(FORMATS)[1:]]
        shown = [n for n in names if n in values and (n != "skipped" or values[n])]
        return "  ".join(FORMATS.get(n, n + " {:.4g}").format(values[n]) for n in shown)

    def _left(self, step: int) -> str:
        if not self._since < step < self.total:
            return ""
        seconds = round((time.monotonic() - self._start) / (step - self._since) * (self.total - step))
        return f"  {seconds // 60}:{seconds % 60:02d} left"


class JsonLines:
    """One object a report: {"step": updates done, name: value, ...}; values that are not finite are null.

    Opened again by a resumed run, lines after step `since` are dropped: the file reads like one undisturbed run.
    """

    def __init__(self, path: Path, since: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= since else []
                except (ValueError, KeyError):  # cut by a kill
                    continue
        tmp = path.with_suffix(".tmp")
        tmp.write_text("".join(line + "\n" for line in kept))
        tmp.replace(path)
        self._file = path.open("a")

    def write(self, step: int, values: Values) -> None:
        numbers = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step} | numbers) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars in TensorBoard's event format, by tensorboard's own writer (no TensorFlow)."""

    def __init__(self, folder: Path, since: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events: Any = event_pb2  # generated modules: their classes are made at import
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._writer = EventFileWriter(str(folder), flush_secs=30)
        if since:  # tells TensorBoard to forget what an interrupted run wrote beyond this step
            log = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=since + 1, session_log=log))

    def write(self, step: int, values: Values) -> None:
        scalars = [self._summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))

    def close(self) -> None:
        self._writer.close()


class WandB:
    """The same numbers to Weights & Biases; the run is named after its folder, and a resume continues it."""

    def __init__(self, folder: Path, name: str) -> None:
        import wandb

        run = folder.parent.name
        self._run = wandb.init(project="distill-jax", name=f"{run}/{name}", id=f"{run}-{name}", resume="allow",
                               dir=str(folder))

    def write(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
