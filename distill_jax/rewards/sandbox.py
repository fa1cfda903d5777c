"""Running programs that a model wrote, where they can do no harm.

    with Sandbox() as sandbox:
        sandbox.run("print(input())", stdin="18")      # Outcome(status="ok", stdout="18\\n", ...)

A program runs as nobody in Linux namespaces of its own: no network and no socket but local ones, no process but its
own, no file but the interpreter's libraries (read-only) and an empty scratch folder in memory, an empty environment,
and limits on CPU time, wall time, memory, processes, file size and output. When it ends, everything it started ends.
Where the platform does not allow that, `Sandbox()` raises `SandboxUnavailable` and says what was refused;
`Sandbox(unsafe=True)` runs programs as this user, with limits only.
"""

import json
import os
import platform
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import LifoQueue
from typing import Any, Literal

from distill_jax.rewards.processes import end_process

START = 60.0  # seconds a runner may take beyond the wall limit of its program, on a loaded machine


class SandboxUnavailable(RuntimeError):
    """This platform cannot shut a program in. The message says what was refused and what to do."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    cpu        seconds of CPU time of each process, rounded up to whole ones
    wall       seconds until everything is ended
    memory     bytes of address space of each process
    disk       bytes of the scratch folder, which is in memory and starts with the program itself; 16 MB
    output     bytes of standard output and error together; a program that writes more is ended
    processes  processes and threads at once. With 1, the default, a program cannot fork and `memory` bounds all of it
    """

    cpu: float = 5.0
    wall: float = 10.0
    memory: int = 512 << 20
    disk: int = 16 << 20
    output: int = 64 << 10
    processes: int = 1

    def __post_init__(self) -> None:
        if bad := {k: v for k, v in asdict(self).items() if not v > 0}:
            raise ValueError(f"limits must be positive, got {bad}")


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program, what it reads on standard input, and files in the folder it starts in (names without a path)."""

    text: str
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if bad := [n for n in self.files if os.path.basename(n) != n or n in ("", ".", "..", "main.py")]:
            raise ValueError(f"files are plain names other than main.py, got {bad}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended.

    status   ok (exit 0) | error (another exit code) | timeout (CPU or wall) | output (wrote too much) | killed (signal)
    code     exit code, or minus the signal; cpu in seconds, memory the largest resident size in bytes
    """

    status: Literal["ok", "error", "timeout", "output", "killed"]
    stdout: str = ""
    stderr: str = ""
    code: int = 0
    cpu: float = 0.0
    memory: int = 0


class Sandbox:
    """A pool of runners. `run` and `map` may be called from any thread; a runner that dies is replaced.

    workers   programs at once, default the number of cores, at most 8; more wait
    packages  folders put on the programs' `sys.path` and shown to them read-only (a site-packages folder, for NumPy);
              where this is root, anybody must be allowed to read them. Without, there is the standard library alone
    unsafe    no isolation: for platforms that have none, and programs that are trusted
    """

    def __init__(self, workers: int | None = None, limits: Limits | None = None, packages: Sequence[str | Path] = (),
                 unsafe: bool = False) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"a Sandbox needs at least one worker, got {workers}")
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.limits = limits or Limits()
        self.unsafe = unsafe
        self._packages = [os.path.realpath(p) for p in packages]
        if missing := [p for p in self._packages if not os.path.isdir(p)]:
            raise ValueError(f"no such folder of packages: {', '.join(missing)}")
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._root = tempfile.TemporaryDirectory(prefix="sandbox-")  # where runners mount the roots of programs
        self._idle: LifoQueue[_Runner | None] = LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)  # a place for a runner that is not started yet
        try:
            self._probe()
        except BaseException:
            self.close()
            raise

    def run(self, text: str, stdin: str = "", files: Mapping[str, str] | None = None,
            limits: Limits | None = None) -> Outcome:
        """Run one program; blocks. Raises ValueError where stdin and files do not fit the disk limit."""
        return self._run(Program(text=text, stdin=stdin, files=files or {}, limits=limits))

    def map(self, programs: Iterable[Program]) -> list[Outcome]:
        """Outcomes in the order of the programs, which run in parallel."""
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        return list(self._threads.map(self._run, programs))

    def close(self) -> None:
        """End the runners and what they run. The sandbox cannot be used again."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        for _ in range(self.workers):
            runner = self._idle.get()
            if runner is not None:
                runner.close()
            self._idle.put(None)
        self._root.cleanup()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, program: Program) -> Outcome:
        limits = program.limits or self.limits
        given = sum(len(t.encode("utf-8", "replace")) for t in (program.stdin, *program.files.values()))
        if given > limits.disk // 2:
            raise ValueError(f"standard input and files of {given} bytes; limits.disk is {limits.disk}, of which they "
                             "may take half")
        if len(program.text.encode("utf-8", "replace")) > limits.disk // 4:
            return Outcome(status="error", code=1, stderr=f"a program of {len(program.text)} characters is not run")
        job = {"program": program.text, "stdin": program.stdin, "files": dict(program.files), "limits": asdict(limits),
               "python": _interpreter(), "packages": self._packages, "root": self._root.name,
               "visible": _visible(self._packages), "isolate": not self.unsafe}
        reply = self._ask(job, limits.wall + START)
        if "refused" in reply:  # fork or mount failed: once more, the machine may have been short of something
            reply = self._ask(job, limits.wall + START)
        if "refused" in reply:
            raise SandboxUnavailable(_refusal(reply["refused"]))
        return _outcome(reply)

    def _ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        runner = self._idle.get()
        try:
            for attempt in (1, 2):
                runner = runner or _Runner()
                try:
                    return runner.ask(job, seconds)
                except (OSError, ValueError) as e:
                    runner.close()
                    runner = None
                    if isinstance(e, TimeoutError):
                        return {"ended": "wall", "stdout": "", "stderr": ""}
                    if attempt == 2:
                        raise RuntimeError(f"the sandbox's runner died twice under one program: {e}") from e
            raise AssertionError
        finally:
            self._idle.put(runner)

    def _probe(self) -> None:
        """Run a program that says a word. Raises SandboxUnavailable where that does not work."""
        if not self.unsafe and platform.system() != "Linux":
            raise SandboxUnavailable(_refusal(f"this is {platform.system()}, and namespaces are Linux's"))
        outcome = self._run(Program(text="print('in')", limits=Limits()))
        if outcome.stdout != "in\n":
            said = outcome.stderr[-500:]
            raise SandboxUnavailable(_refusal(f"a first program did not run: {outcome.status}, {said!r}"))


def _refusal(why: str) -> str:
    return (f"programs cannot be shut in here: {why}. Needed are unprivileged user namespaces, or root with "
            "CAP_SYS_ADMIN (in a container: --privileged or a profile that allows unshare and mount), Linux 5.14 or "
            "later on x86_64 or aarch64. Sandbox(unsafe=True) runs generated code as this user, without isolation")


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _visible(packages: Sequence[str]) -> list[str]:
    """What of this machine a program sees: the interpreter, its library, shared libraries, packages."""
    prefix = os.path.realpath(sys.base_prefix)
    own = [prefix] if prefix not in ("/usr", "/usr/local", "/") else [_interpreter(), f"{prefix}/lib"]
    library = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    shared = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    return sorted({p for p in (*own, _interpreter(), *library, *shared, *packages) if os.path.lexists(p)})


def _outcome(reply: Mapping[str, Any]) -> Outcome:
    code = os.waitstatus_to_exitcode(reply["status"]) if "status" in reply else -signal.SIGKILL
    if reply["ended"] != "exit":
        status = "timeout" if reply["ended"] == "wall" else "output"
    elif code == -signal.SIGXCPU:
        status = "timeout"
    else:
        status = "ok" if code == 0 else "error" if code > 0 else "killed"
    return Outcome(status=status, stdout=reply["stdout"], stderr=reply["stderr"], code=code,
                   cpu=reply.get("cpu", 0.0), memory=reply.get("rss", 0))


class _Runner:
    """One `rewards.sandbox_runner` process. Its environment has nothing of ours but where this package is."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-m", "distill_jax.rewards.sandbox_runner"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PYTHONPATH": root}, cwd="/",
            start_new_session=True)

    def ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Raises TimeoutError, OSError or ValueError; the runner is then of no use."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        fd, end, data = self.process.stdout.fileno(), time.monotonic() + seconds, bytearray()
        while not data.endswith(b"\n"):
            if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("no reply")
            piece = os.read(fd, 1 << 16)
            if not piece:
                raise OSError("it ended without a reply")
            data += piece
        return json.loads(data)

    def close(self) -> None:
        end_process(self.process)
