"""SIGTERM and SIGINT become one decision that every process takes at the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = Any
NOTHING, SAVE, STOP = 0, 1, 2


class Votes:
    """What this process wants, and what all of them agreed on.

    With one process the wish is the decision. With several, each step carries every process's wish to the devices
    and brings back the largest; processes read it equally late, so they all act at the same step. It needs no host
    sync, and a signal that reaches only one host stops them all.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.wish, self.signal = NOTHING, ""
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._devices = mesh.size
        self.shared = not self._sharding.is_fully_addressable
        self._arrays: dict[int, Array] = {}

    def ballot(self) -> Array | None:
        """The array that goes into the next step; None with one process."""
        if not self.shared:
            return None
        if self.wish not in self._arrays:
            local = len(self._sharding.addressable_devices)
            self._arrays[self.wish] = jax.make_array_from_process_local_data(
                self._sharding, np.full(local, self.wish, np.int32), (self._devices,))
        return self._arrays[self.wish]

    def decision(self, metrics: dict[str, Any]) -> int:
        """What to do after the step that gave these metrics: NOTHING, SAVE or STOP."""
        return int(metrics["vote"]) if self.shared else self.wish

    def want(self, wish: int) -> None:
        self.wish = max(self.wish, wish)

    def saved(self) -> None:
        """A wish to save is fulfilled."""
        self.wish = STOP if self.wish == STOP else NOTHING

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT inside the block; a second SIGINT interrupts at once. Main thread only."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.wish == STOP and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.wish, self.signal = STOP, signal.Signals(number).name

        before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not Python's
