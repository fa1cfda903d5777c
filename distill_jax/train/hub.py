"""Process 0's side of a run of several processes: who has come, who waits where, who is gone.

Every process, 0 too, holds one connection to the hub and says on it where it is. A process that is killed closes its
connection at once; one that is stopped, or whose host is gone, is silent for longer than the heartbeat. Either way the
others are told its number, where it ran and what it did last. Messages are lines of JSON.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
GRACE = 5.0
"""Seconds in which a process may end by itself after another one has said that it ends with an error."""


def send(sock: socket.socket, message: Message) -> None:
    sock.sendall(json.dumps(message).encode() + b"\n")


class Lines:
    """What a connection has said, cut into messages."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self._rest = sock, b""

    def read(self) -> list[Message] | None:
        """The messages that are there now; None when the other side has closed. Raises ValueError for anything that
        is not a message."""
        try:
            data = self.sock.recv(65536)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > 65536:
            raise ValueError("no end of a line in 65536 bytes")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(m, dict) for m in messages):
            raise ValueError("expected an object a line")
        return messages


@dataclass
class Member:
    """A connection, and what is known of the process behind it; `number` is -1 until it has said hello."""

    lines: Lines
    seen: float
    number: int = -1
    place: str = ""
    where: str = "the start"
    left: bool = False

    def __str__(self) -> str:
        return f"process {self.number} ({self.place})"


@dataclass
class Meeting:
    """A barrier that some have reached: what each brought, and when its time is up (None: never)."""

    values: dict[int, str] = field(default_factory=dict)
    until: float | None = None


class Hub:
    """A thread that hears every process. `offer` is what all are told when the last of them has come.

    start_seconds  for all to come; `heartbeat`: seconds of silence after which a process counts as gone
    """

    def __init__(self, listener: socket.socket, processes: int, *, start_seconds: float, heartbeat: float,
                 offer: Message) -> None:
        self.processes, self.heartbeat, self.offer = processes, heartbeat, offer
        self.start_seconds = start_seconds
        self.started, self.ended = False, False
        self._failed, self._failed_at = "", 0.0
        self._began = time.monotonic()
        self._meetings: dict[str, Meeting] = {}
        self._open: list[Member] = []
        self._listener = listener
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self.thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self.thread.start()

    @property
    def members(self) -> dict[int, Member]:
        return {m.number: m for m in self._open if m.number >= 0}

    def _run(self) -> None:
        tick = min(0.5, self.heartbeat / 6)
        beat = 0.0
        while not self.ended:
            for key, _ in self._selector.select(tick):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if now - beat >= tick:
                beat = now
                self._tell({"beat": 1})
            self._check(now)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.settimeout(5.0)
        member = Member(lines=Lines(sock), seen=time.monotonic())
        self._open.append(member)
        self._selector.register(sock, selectors.EVENT_READ, member)

    def _hear(self, member: Member) -> None:
        if member not in self._open:  # closed while this round was read
            return
        try:
            messages = member.lines.read()
        except ValueError:  # a stranger on our port
            return self._close(member)
        if messages is None:
            self._close(member)
            if member.number >= 0 and not member.left and self.started:
                self._lost(f"{member} is gone; last seen at {member.where}")
            return
        member.seen = time.monotonic()
        for message in messages:
            self._take(member, message)

    def _take(self, member: Member, message: Message) -> None:
        member.where = message.get("where", member.where)
        if "hello" in message:
            self._welcome(member, message)
        elif member.number < 0:
            self._close(member)
        elif "at" in message:
            self._arrive(member, message)
        elif "tell" in message and (first := self.members.get(0)) is not None:
            self._send(first, {"told": message["tell"], "value": message["value"]})
        elif "bye" in message:
            member.left = True
            if message["bye"]:
                self._lost(f"{member} ended at {member.where}: {message['why']}", GRACE)
            self._send(member, {"pass": "bye"})
            self.ended = all(m.left for m in self.members.values())

    def _welcome(self, member: Member, message: Message) -> None:
        number, place = message["hello"], str(message["place"])
        said = f"process {number} ({place})"
        if self._failed:
            return self._refuse(member, self._failed)
        if self.started:
            return self._refuse(member, f"{said} came after the run had begun with all its {self.processes} "
                                        "processes; end what is left of the old run, or give this one another port")
        if message["processes"] != self.processes:
            return self._fail(member, f"{said} was told of {message['processes']} processes, process 0 of "
                                      f"{self.processes}; start all of them with one number")
        if (same := self.members.get(number)) is not None:
            return self._fail(member, f"two processes call themselves {number}: {same.place} and {place}; give every "
                                      f"process its own number from 0 to {self.processes - 1}")
        member.number, member.place = number, place
        mine = self.members.get(0)
        if mine is not None and len(self.members) == self.processes:
            self.started = True
            self._tell({"go": self.offer})

    def _arrive(self, member: Member, message: Message) -> None:
        name, seconds = message["at"], message["seconds"]
        meeting = self._meetings.setdefault(name, Meeting())
        if seconds is not None and meeting.until is None:
            meeting.until = time.monotonic() + seconds
        meeting.values[member.number] = message["value"]
        if len(meeting.values) < self.processes:
            return self._check_apart()
        del self._meetings[name]
        others = [n for n, v in sorted(meeting.values.items()) if v != meeting.values[0]]
        if others:
            n = others[0]
            self._lost(f"at {name} process 0 has {meeting.values[0]}, but {self.members[n]} has {meeting.values[n]}; "
                       "do all processes see the same run folder and start with the same arguments?")
        else:
            self._tell({"pass": name})

    def _check_apart(self) -> None:
        """Whether all wait, but not at one place."""
        if sum(len(m.values) for m in self._meetings.values()) == self.processes:
            places = [f"{name}: {', '.join(map(str, sorted(m.values)))}" for name, m in self._meetings.items()]
            self._lost(f"processes wait for each other at different places ({'; '.join(places)}); were all started "
                       "with the same command, and do all see the same run folder?")

    def _check(self, now: float) -> None:
        """Whose time is up."""
        if self._failed:
            self.ended = now - self._failed_at > 0.5  # who is just coming is told too
            return
        if not self.started:
            if now - self._began > self.start_seconds:
                self._fail(None, self._absent())
            return
        for member in self.members.values():
            if not member.left and now - member.seen > self.heartbeat:
                return self._lost(f"{member} has been silent for {now - member.seen:.0f} s; last seen at "
                                  f"{member.where}")
        for name, meeting in self._meetings.items():
            missing = [m for n, m in sorted(self.members.items()) if n not in meeting.values]
            if over := [m for m in missing if m.left]:
                return self._lost(f"{over[0]} has ended at {over[0].where}, others wait for it at {name}")
            if meeting.until is not None and now > meeting.until:
                return self._lost(f"{name}: its time is up and {len(missing)} of {self.processes} processes did not "
                                  "come: " + "; ".join(f"{m}, last seen at {m.where}" for m in missing[:8]))

    def _absent(self) -> str:
        missing = [str(n) for n in range(self.processes) if n not in self.members]
        here = [f"{n} ({m.place})" for n, m in sorted(self.members.items())]
        word = "process" if len(missing) == 1 else "processes"
        return (f"{len(missing)} of {self.processes} processes did not come within {self.start_seconds:g} s: {word} "
                f"{', '.join(missing[:16])}{', ...' if len(missing) > 16 else ''}; here are {', '.join(here[:8])}"
                f"{', ...' if len(here) > 8 else ''}. Look at the logs of those that are absent")

    def _lost(self, text: str, grace: float = 0.0) -> None:
        self._tell({"lost": text, "grace": grace})

    def _fail(self, member: Member | None, text: str) -> None:
        """The run cannot begin: all who are here are told why."""
        if member is not None:
            self._refuse(member, text)
        for other in list(self._open):
            self._refuse(other, text, absent=member is None)
        self._failed, self._failed_at = text, time.monotonic()

    def _refuse(self, member: Member, text: str, absent: bool = False) -> None:
        self._send(member, {"refused": text, "absent": absent or self.started})
        self._close(member)

    def _tell(self, message: Message) -> None:
        for _, member in sorted(self.members.items(), reverse=True):  # process 0 last: with it ends the hub
            self._send(member, message)

    def _send(self, member: Member, message: Message) -> None:
        with contextlib.suppress(OSError):  # its end is read as such
            send(member.lines.sock, message)

    def _close(self, member: Member) -> None:
        if member in self._open:
            self._open.remove(member)
            self._selector.unregister(member.lines.sock)
            member.lines.sock.close()
