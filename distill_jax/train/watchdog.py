"""Ends a process of which no update is done any more: all are alive, but a collective hangs."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator

from distill_jax.train import peers


class Watchdog:
    """Asks for a sign of life every `seconds`, from the first one on; `on_stall(text)` is called from a thread.

    seconds  None: DISTILL_JAX_STALL_SECONDS, else 1800 where there are several processes, else never
    """

    def __init__(self, seconds: float | None = None, on_stall: Callable[[str], None] | None = None) -> None:
        self.seconds, self._on_stall = seconds or _limit(), on_stall or _end
        self._last: float | None = None
        self._over = threading.Event()

    def alive(self) -> None:
        """An update is done."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch inside the block."""
        if self.seconds < float("inf"):
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield self
        finally:
            self._over.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block something else than updates takes its time."""
        started, self._last = self._last, None
        try:
            yield
        finally:
            self._last = None if started is None else time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 10)):
            last = self._last
            if last is not None and time.monotonic() - last > self.seconds:
                return self._on_stall(f"no update was done for {self.seconds:g} s (DISTILL_JAX_STALL_SECONDS)")


def _limit() -> float:
    default = 1800.0 if peers.current().processes > 1 else float("inf")
    return peers.seconds_of("DISTILL_JAX_STALL_SECONDS", default)


def _end(text: str) -> None:
    """Show where every thread is, tell the others, and end."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback(sys.__stderr__)
    peers.current().leave(peers.RESTART, text)
    peers.end_for_restart(text)
