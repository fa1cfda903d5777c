"""Child processes that are spoken to through pipes: the checker's workers and the sandbox's runners."""

import contextlib
import subprocess
from typing import Any


def end_process(process: "subprocess.Popen[Any]") -> None:
    """Kill it, whatever it does, and close its pipes."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
