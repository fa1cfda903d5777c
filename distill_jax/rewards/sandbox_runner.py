"""The process that shuts programs in: `python -m distill_jax.rewards.sandbox_runner`, started by `rewards.sandbox`.

One JSON object a line in, one a line out. For each program: a child in new namespaces, in it the first process of its
process namespace, which builds the root and starts the interpreter; when that first process ends, the kernel ends
everything it left behind. This process reads the output and keeps the time. Standard library only.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

from distill_jax.rewards import isolate

GRACE = 0.5  # seconds between the end of the program and the end of reading what it wrote

_BOOT = """\
import sys, builtins
builtins.exit = builtins.quit = sys.exit
sys.path[:0] = {packages!r}
sys.argv = ["main.py"]
del sys, builtins
exec(compile(open("main.py", encoding="utf-8").read(), "main.py", "exec"))
"""


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):  # not Linux
        isolate.adopt_orphans()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=replies, flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job: {program, stdin, files, limits, python, packages, visible, root, isolate}."""
    out_r, out_w = os.pipe()
    err_r, err_w = os.pipe()
    say_r, say_w = os.pipe()
    scratch = "" if job["isolate"] else tempfile.mkdtemp(prefix="unsafe-")
    child = os.fork()
    if child == 0:
        for fd in (out_r, err_r, say_r):
            os.close(fd)
        _child(job, out_w, err_w, say_w, scratch)
    for fd in (out_w, err_w, say_w):
        os.close(fd)
    try:
        ended, texts = _listen(child, {out_r: "stdout", err_r: "stderr", say_r: "say"}, job["limits"])
    finally:
        _kill_group(child)
        os.waitpid(child, 0)
        _reap()
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    reply: dict[str, Any] = {name: texts[name].decode("utf-8", "replace") for name in ("stdout", "stderr")}
    with contextlib.suppress(ValueError):
        reply |= json.loads(texts["say"] or b"{}")
    return reply | {"ended": ended}


def _listen(child: int, names: dict[int, str], limits: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Read until everything is closed, or a limit is met. ("exit" | "wall" | "output", what was read)"""
    texts = {name: bytearray() for name in names.values()}
    end, ended = time.monotonic() + limits["wall"], "exit"
    open_fds = set(names)
    said = False
    while open_fds:
        left = end - time.monotonic()
        ready = select.select(list(open_fds), [], [], max(0.0, left))[0]
        if not ready:
            ended = "exit" if said else "wall"
            break
        for fd in ready:
            data = os.read(fd, 65536)
            if not data:
                open_fds.discard(fd)
                if names[fd] == "say" and not said:  # the program is over; a pipe may still be held open
                    said, end = True, min(end, time.monotonic() + GRACE)
                continue
            texts[names[fd]] += data
        if len(texts["stdout"]) + len(texts["stderr"]) > limits["output"]:
            ended = "output"
            break
    for fd in names:
        os.close(fd)
    return ended, {name: bytes(t[:limits["output"]]) for name, t in texts.items()}


def _kill_group(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _reap() -> None:
    """Wait for what the program left behind; all of it was killed, but for what left its group in unsafe mode."""
    end = time.monotonic() + 1.0
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)


def _child(job: dict[str, Any], out: int, err: int, say: int, scratch: str) -> None:
    """Never returns. Reports on `say`: {"refused": why}, or {"status", "cpu", "rss"} of the program."""
    code = 1
    try:
        os.setsid()
        if not job["isolate"]:
            code = _start(job, out, err, say, scratch)
        else:
            isolate.die_with_parent()
            isolate.enter_namespaces()
            first = os.fork()
            if first == 0:
                isolate.die_with_parent()
                isolate.build_root(job["root"], job["visible"], job["limits"]["disk"])
                code = _start(job, out, err, say, isolate.SCRATCH)
            else:
                for fd in (out, err, say):
                    os.close(fd)
                os.waitpid(first, 0)
                code = 0
    except BaseException as e:
        _say(say, {"refused": str(e) or type(e).__name__})
    finally:
        os._exit(code)


def _start(job: dict[str, Any], out: int, err: int, say: int, scratch: str) -> int:
    """Start the interpreter on the program in `scratch`, wait for it, report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(scratch)
    for name, text in {**job["files"], "main.py": job["program"]}.items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as f:
            f.write(text)
    stdin = tempfile.TemporaryFile(dir=".")  # noqa: SIM115 - a file, so that nobody has to feed a pipe
    stdin.write(job["stdin"].encode("utf-8", "replace"))
    stdin.seek(0)
    program = os.fork()
    if program == 0:
        try:
            _become(job, stdin.fileno(), out, err, scratch)
        except BaseException as e:
            _say(say, {"refused": str(e) or type(e).__name__})
        finally:
            os._exit(127)
    os.close(out)
    os.close(err)
    _, status, usage = os.wait4(program, 0)
    _say(say, {"status": status, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * 1024})
    return 0


def _become(job: dict[str, Any], stdin: int, out: int, err: int, scratch: str) -> None:
    limits = job["limits"]
    if job["isolate"]:
        os.setsid()  # else it stays in the group that is killed at the end
    for fd, target in ((stdin, 0), (out, 1), (err, 2)):
        os.dup2(fd, target)
    if job["isolate"]:
        isolate.drop_privileges()
    isolate.limit(cpu=limits["cpu"], memory=limits["memory"], file=limits["disk"],
                  processes=limits["processes"] if job["isolate"] else None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if job["isolate"]:
        isolate.filter_calls()
    env = {"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "PATH": "/nowhere", "PYTHONHASHSEED": "0",
           "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    boot = _BOOT.format(packages=list(job["packages"]))
    os.execve(job["python"], [job["python"], "-s", "-S", "-P", "-B", "-c", boot], env)


def _say(fd: int, what: dict[str, Any]) -> None:
    os.write(fd, json.dumps(what).encode())


if __name__ == "__main__":
    main()
