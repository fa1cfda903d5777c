"""Rows that the input had to leave out: every shard they are in is said once, whichever process met it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from distill_jax.train import peers
from distill_jax.train.hub import Message
from distill_jax.train.metrics import Reporter


class BadShard(Protocol):
    """A place with rows that cannot be read, and how many; as text, a line for the reader."""

    @property
    def place(self) -> str: ...
    @property
    def lost(self) -> int: ...


Damaged = Callable[[], Sequence[BadShard]]


class LostRows:
    """What this process left out, and on process 0 what all did. `numbers`: metrics, empty while nothing is lost."""

    def __init__(self, stage: str = "", damaged: Damaged = list) -> None:
        self._stage, self._damaged = stage, damaged
        self._passed: dict[str, Message] = {}
        self._said: dict[str, Message] = {}

    def pass_on(self) -> None:
        """Tell process 0 what was found since the last call."""
        for bad in self._damaged():
            value = {"lost": bad.lost, "line": str(bad)}
            if self._passed.get(bad.place) != value:
                self._passed[bad.place] = value
                peers.current().tell(f"lost/{self._stage}/{bad.place}", value)

    def say(self, reporter: Reporter) -> None:
        """A line for every shard that was not there at the last call."""
        prefix = f"lost/{self._stage}/"
        told = {k.removeprefix(prefix): v for k, v in peers.current().told().items() if k.startswith(prefix)}
        for place, value in sorted((told | self._passed).items()):
            if place not in self._said:
                reporter.say(value["line"])
            self._said[place] = value

    @property
    def numbers(self) -> dict[str, float]:
        """Shards with rows that cannot be read, and those rows, of what was said so far."""
        if not self._said:
            return {}
        return {"bad_shards": float(len(self._said)), "lost_rows": float(sum(v["lost"] for v in self._said.values()))}
