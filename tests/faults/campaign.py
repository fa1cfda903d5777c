"""Kill a command at random moments, start it again until it is done, and compare with an undisturbed run.

The command must be one that continues where it was when started again, and whose output is meant to be the same to
the byte. Used by the campaigns of store writing, import and training.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Report:
    """kills sent while the command was running, runs started, and the seconds of each run."""

    kills: int
    runs: int
    seconds: tuple[float, ...]


def run_killed(command: Sequence[str], *, kills: int, seed: int, window: tuple[float, float],
               env: Mapping[str, str] | None = None, progress: Callable[[], object] | None = None,
               timeout: float = 600.0) -> Report:
    """SIGKILL `command` (its whole process group) `kills` times, then let it finish. Moments are uniform in `window`,
    seconds after the start, or after `progress()` first changed in that run when it is given.

    A run that ends by itself before its moment ends the campaign. Raises AssertionError with the output when a run
    fails by itself.
    """
    rng = np.random.default_rng(seed)
    sent, seconds = 0, []
    while True:
        begun = time.monotonic()
        before = progress() if progress else None
        process = subprocess.Popen(command, env={**os.environ, **(env or {})}, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            if sent < kills:
                if progress is not None:
                    while process.poll() is None and progress() == before and time.monotonic() - begun < timeout:
                        time.sleep(0.01)
                output, killed = _kill_after(process, float(rng.uniform(*window)))
                sent += killed
            else:
                output, killed = process.communicate(timeout=timeout)[0], False
        finally:
            _kill_group(process)
        seconds.append(time.monotonic() - begun)
        if not killed:
            failure = f"{' '.join(command)}\nexit {process.returncode} after {sent} kills:\n{output}"
            assert process.returncode == 0, failure
            return Report(kills=sent, runs=len(seconds), seconds=tuple(seconds))


def _kill_after(process: subprocess.Popen[str], delay: float) -> tuple[str, bool]:
    """(output, whether it had to be killed) of a process that gets `delay` more seconds."""
    try:
        return process.communicate(timeout=delay)[0], False
    except subprocess.TimeoutExpired:
        _kill_group(process)
        output = process.communicate()[0]
        return output, process.returncode == -signal.SIGKILL


def _kill_group(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def differences(a: Path, b: Path, ignore: Callable[[str], bool] = lambda name: False) -> list[str]:
    """Files of two folders that are not the same to the byte, one line each. `ignore` gets relative paths."""
    names = [{p.relative_to(x).as_posix() for p in x.rglob("*") if p.is_file()} for x in (a, b)]
    out = [f"only in {a}: {n}" for n in sorted(names[0] - names[1]) if not ignore(n)]
    out += [f"only in {b}: {n}" for n in sorted(names[1] - names[0]) if not ignore(n)]
    out += [f"differs: {n}" for n in sorted(names[0] & names[1])
            if not ignore(n) and (a / n).read_bytes() != (b / n).read_bytes()]
    return out
