"""Many checks at once, from any thread, none of which can hang: algebra in processes under a hard time limit."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from typing import Any

from distill_jax.rewards.answers import Kind
from distill_jax.rewards.check import Pending, Verdict, decide
from distill_jax.rewards.processes import end_process

START = 120.0  # seconds a worker may take to import its libraries on a loaded machine
WALL = 6.0  # times the CPU limit: the guard against a worker that sleeps instead of computing


class TimedOut(Exception):
    """The question used up its time; its worker is gone."""


class Crashed(Exception):
    """The worker died under the question (out of memory, stack overflow)."""


class Worker:
    """One process with one question at a time. No fork of this process: it inherits no threads, no accelerator."""

    def __init__(self, seconds: float) -> None:
        root = str(Path(__file__).resolve().parents[2])  # the worker imports the same package as this process
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.seconds = seconds
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distill_jax.rewards.worker", str(seconds)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path},
            start_new_session=True)  # a Ctrl-C is for the parent; closing the pipe ends the worker
        try:
            self._read(START)
        except (TimedOut, Crashed):
            self.close()
            raise RuntimeError(f"an answer-checking process did not start within {START:.0f} s "
                               "(is math-verify installed?)") from None

    def ask(self, gold: str, answer: str) -> bool:
        """Whether the two are equal. Raises TimedOut or Crashed; the worker is then dead."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise Crashed from None
        return bool(self._read(WALL * self.seconds)["equal"])

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        end, data = time.monotonic() + seconds, b""
        while not data.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                self.close()
                raise TimedOut
            piece = os.read(fd, 65536)
            if not piece:
                code = self.process.wait()
                raise TimedOut if code == -signal.SIGPROF else Crashed
            data += piece
        return json.loads(data)

    def close(self) -> None:
        end_process(self.process)


@dataclass(frozen=True, kw_only=True)
class Query:
    """One completion to check: see `rewards.check.check`."""

    completion: str
    golds: Sequence[str]
    kind: Kind = "auto"


class Checker:
    """`check` with limits. Workers start when the first formula needs one and live until `close`.

    workers   processes; questions beyond that wait
    timeout   seconds of CPU time for one comparison; the verdict is then `correct=None, timed_out=True`, and counted
    """

    def __init__(self, workers: int | None = None, timeout: float = 5.0) -> None:
        if timeout <= 0 or (workers is not None and workers < 1):
            raise ValueError(f"Checker needs a positive timeout and at least one worker, got {timeout=} {workers=}")
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.timeout = timeout
        self.timeouts = 0
        self.crashes = 0
        self._lock = threading.Lock()
        self._idle: LifoQueue[Worker | None] = LifoQueue()
        self._threads: ThreadPoolExecutor | None = None
        for _ in range(self.workers):
            self._idle.put(None)  # a place for a worker that is not started yet

    def check(self, completion: str, golds: str | Sequence[str], kind: Kind = "auto") -> Verdict:
        """The verdict on one completion; blocks. Safe from any thread."""
        step = decide(completion, golds, kind)
        return step if isinstance(step, Verdict) else self._algebra(step)

    def map(self, queries: Iterable[Query]) -> list[Verdict]:
        """Verdicts in the order of the queries, algebra in parallel."""
        steps = [decide(q.completion, q.golds, q.kind) for q in queries]
        settled = iter(self.settle([s for s in steps if isinstance(s, Pending)]))
        return [s if isinstance(s, Verdict) else next(settled) for s in steps]

    def settle(self, pending: Sequence[Pending]) -> list[Verdict]:
        """What `decide` left open, in order, in parallel."""
        if not pending:
            return []
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="checker")
        return list(self._threads.map(self._algebra, pending))

    def _algebra(self, step: Pending) -> Verdict:
        timed_out = crashed = False
        for gold in step.golds:
            worker = self._idle.get()
            try:
                worker = worker or Worker(self.timeout)
                if worker.ask(gold, step.extracted):
                    return Verdict(correct=True, extracted=step.extracted, method="math")
            except (TimedOut, Crashed) as e:
                timed_out, crashed = timed_out or isinstance(e, TimedOut), crashed or isinstance(e, Crashed)
                if worker is not None:
                    worker.close()
                worker = None
            finally:
                self._idle.put(worker)
        with self._lock:
            self.timeouts += timed_out
            self.crashes += crashed
        if timed_out or crashed:
            return Verdict(correct=None, extracted=step.extracted, method="timeout" if timed_out else "crash",
                           timed_out=timed_out)
        return Verdict(correct=False, extracted=step.extracted, method=step.method)

    def close(self) -> None:
        """End the workers. The checker can be used again: it starts new ones."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        for _ in range(self.workers):
            worker = self._idle.get()
            if worker is not None:
                worker.close()
        for _ in range(self.workers):
            self._idle.put(None)

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
