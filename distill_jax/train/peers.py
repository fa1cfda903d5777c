"""The other processes of a run, as one process sees them: a roll call, barriers with a time limit, a heartbeat.

JAX's collectives wait for ever, and its own service ends a process with an abort. So each process keeps a connection
to process 0 (`hub`); when another one is gone, stopped or late, a thread ends this process with the code RESTART and
one line that names it. Where a run has one process, `current()` is `ALONE` and nothing waits.
"""

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from distill_jax.train.hub import Hub, Lines, Message, send

RESTART = 75
"""Exit code that asks for the same command again (EX_TEMPFAIL): this process is well, another one is gone or hangs."""


class Absent(Exception):
    """A process that this one waits for is not there; the same command started again may find it."""


class Peers(Protocol):
    process: int
    processes: int

    def note(self, where: str) -> None:
        """What this process is doing, for those who will miss it."""
        ...

    def tell(self, key: str, value: Message) -> None:
        """Let process 0 know of something, once; a second value of a key takes the place of the first."""
        ...

    def told(self) -> dict[str, Message]:
        """On process 0 what all have told it; elsewhere, and of a single process, nothing."""
        ...

    def barrier(self, name: str, value: str = "", seconds: float | None = None) -> None:
        """Wait for all processes, `seconds` at most (None: DISTILL_JAX_BARRIER_SECONDS; inf: for ever), and compare
        what they bring. Raises Absent."""
        ...

    def leave(self, code: int = 0, why: str = "") -> None:
        """Say goodbye: nobody waits for this process from now on. With a code, the others end too."""
        ...


class Alone:
    """The only process of a run."""

    process, processes = 0, 1

    def note(self, where: str) -> None: ...
    def tell(self, key: str, value: Message) -> None: ...
    def told(self) -> dict[str, Message]: return {}
    def barrier(self, name: str, value: str = "", seconds: float | None = None) -> None: ...
    def leave(self, code: int = 0, why: str = "") -> None: ...


ALONE = Alone()
_current: Peers = ALONE


def current() -> Peers:
    """The peers of this process."""
    return _current


def become(peers: Peers) -> None:
    """Make them what `current` gives."""
    global _current
    _current = peers


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process works without the others, who wait for it elsewhere."""
    ours = current()
    become(ALONE)
    try:
        yield
    finally:
        become(ours)


def seconds_of(name: str, default: float) -> float:
    """A positive number of seconds from the environment. Raises ValueError for anything else."""
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ValueError(f"{name}={text!r}: expected a positive number of seconds, e.g. {default:g}")
    return value


def end_for_restart(why: str) -> None:
    """End this process at once with the code RESTART; nothing that waits for others can be waited for."""
    with contextlib.suppress(Exception):
        print(f"process {current().process}: {why}; ending with code {RESTART}, the same command continues from the "
              "last checkpoint", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(RESTART)


class Connected:
    """One of several processes, with its connection to the hub. `on_lost(text)` is called from a thread."""

    def __init__(self, lines: Lines, process: int, processes: int, *, heartbeat: float,
                 on_lost: Callable[[str], None] = end_for_restart, heard: Sequence[Message] = ()) -> None:
        self.process, self.processes, self.lost = process, processes, ""
        self._first = heard
        self._lines, self._heartbeat, self._on_lost = lines, heartbeat, on_lost
        self._where, self._left, self._told = "the start", False, dict[str, Message]()
        self._writing, self._passed, self._changed = threading.Lock(), set[str](), threading.Condition()
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def note(self, where: str) -> None:
        self._where = where  # goes with the next beat

    def tell(self, key: str, value: Message) -> None:
        self._say({"tell": key, "value": value})

    def told(self) -> dict[str, Message]:
        return dict(self._told)

    def barrier(self, name: str, value: str = "", seconds: float | None = None) -> None:
        limit = seconds_of("DISTILL_JAX_BARRIER_SECONDS", 1800) if seconds is None else seconds
        self.note(name)
        self._say({"at": name, "value": value, "seconds": None if limit == float("inf") else limit})
        with self._changed:
            self._changed.wait_for(lambda: name in self._passed or self.lost)
            if name not in self._passed:
                raise Absent(self.lost)
            self._passed.remove(name)

    def leave(self, code: int = 0, why: str = "") -> None:
        self._left = True
        self._say({"bye": code, "why": why})
        with self._changed:  # process 0 may end only when the others have been told
            self._changed.wait_for(lambda: "bye" in self._passed or self.lost, timeout=2.0)

    def _say(self, message: Message) -> None:
        with self._writing, contextlib.suppress(OSError):  # a broken connection is noticed by the thread
            send(self._lines.sock, message | {"where": self._where})

    def _listen(self) -> None:
        interval = min(5.0, self._heartbeat / 6)
        heard, beat = time.monotonic(), 0.0
        for message in self._first:
            self._take(message)
        while not self.lost:
            now = time.monotonic()
            if now - beat >= interval and not self._left:
                beat = now
                self._say({"beat": 1})
            ready, _, _ = select.select([self._lines.sock], [], [], interval)
            if ready:
                messages = self._lines.read()
                if messages is None:
                    return None if self._left else self._lose("process 0 is gone")
                heard = time.monotonic()
                for message in messages:
                    self._take(message)
            elif not self._left and time.monotonic() - heard > self._heartbeat:
                self._lose(f"process 0 has been silent for {time.monotonic() - heard:.0f} s")

    def _take(self, message: Message) -> None:
        if "pass" in message:
            with self._changed:
                self._passed.add(message["pass"])
                self._changed.notify_all()
        elif "told" in message:
            self._told[message["told"]] = message["value"]
        elif "lost" in message and not self._left:
            time.sleep(message["grace"])
            self._lose(message["lost"])

    def _lose(self, text: str) -> None:
        with self._changed:
            self.lost = text
            self._changed.notify_all()
        if not self._left:  # it may have found its own way out within the grace
            self._on_lost(text)


def listen(port: int) -> socket.socket:
    """A listening socket on every address of this host. Raises ValueError where the port is in use."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024)
    except OSError as e:
        raise ValueError(f"process 0 cannot listen on port {port}: {e.strerror or e}; end what uses it (an earlier "
                         "run?), or give all processes another port in DISTILL_JAX_COORDINATOR") from e


def call_roll(host: str, port: int, process: int, processes: int, *, start_seconds: float, heartbeat: float,
              offer: Callable[[], Message] = dict, on_lost: Callable[[str], None] = end_for_restart,
              listener: socket.socket | None = None) -> tuple[Connected, Message]:
    """Meet all processes at `host:port`, where process 0 listens -> (the connection, what process 0 offers).

    Raises ValueError for what a person must change (port, address, numbers), Absent for processes that did not come.
    """
    until = time.monotonic() + start_seconds
    hub = None
    if process == 0:
        hub = Hub(listener or listen(port), processes, start_seconds=start_seconds, heartbeat=heartbeat, offer=offer())
        host = "localhost"
    sock = _connect(host, port, until, start_seconds)
    place = f"{socket.gethostname()}, pid {os.getpid()}"
    with contextlib.suppress(OSError):  # said by the next read
        send(sock, {"hello": process, "processes": processes, "place": place})
    lines, at = Lines(sock), f"{host}:{port}"
    while True:
        sock.settimeout(max(1.0, until + heartbeat - time.monotonic()))  # the hub says who is absent, and is given time
        try:
            messages = lines.read()
        except ValueError:
            raise ValueError(f"{at} is in use by another program than process 0 of this run; give all processes a "
                             "free port in DISTILL_JAX_COORDINATOR") from None
        if messages is None:
            raise Absent(f"process 0 at {at} ended before all {processes} processes had come; look at its log")
        if not messages and time.monotonic() > until + heartbeat:
            raise Absent(f"{at} takes connections, but says nothing: process 0 hangs, or another program is there")
        for i, message in enumerate(messages):
            if "refused" in message:
                if hub is not None:
                    hub.thread.join(2.0)  # it tells those who are just coming
                raise (Absent if message["absent"] else ValueError)(message["refused"])
            if "go" in message:
                sock.settimeout(None)
                rest = messages[i + 1:]
                return (Connected(lines, process, processes, heartbeat=heartbeat, on_lost=on_lost, heard=rest),
                        message["go"])


def _connect(host: str, port: int, until: float, limit: float) -> socket.socket:
    """A connection to process 0, tried until the time is up: it may start later, and so may its name."""
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.5, min(10.0, until - time.monotonic())))
        except OSError as e:
            if time.monotonic() < until:
                time.sleep(0.2)
                continue
            if isinstance(e, socket.gaierror):
                raise ValueError(f"the coordinator's address {host!r} does not resolve ({e.strerror}) after {limit:g} "
                                 "s; give host:port of process 0 in DISTILL_JAX_COORDINATOR") from e
            raise Absent(f"process 0 did not answer at {host}:{port} within {limit:g} s ({e.strerror or e}): is it "
                         "running, and does the network let it through?") from e
