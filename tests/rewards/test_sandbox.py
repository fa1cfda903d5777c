"""Programs that try to get out. They run inside the limits that they try; without namespaces the tests skip."""

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from distill_jax.rewards import sandbox as module
from distill_jax.rewards.sandbox import Limits, Program, Sandbox, SandboxUnavailable

TRY = """
def attempt(what):
    try:
        print("GOT", what())
    except Exception as e:
        print("no", type(e).__name__)
"""


@pytest.fixture(scope="module")
def box():
    try:
        box = Sandbox(workers=2)
    except SandboxUnavailable as e:
        pytest.skip(str(e))
    with box:
        yield box


def nothing_got(outcome):
    assert outcome.status == "ok", outcome
    assert outcome.stdout and "GOT" not in outcome.stdout, outcome.stdout


def test_a_program_that_means_no_harm(box):
    outcome = box.run("import math, sys\nprint(int(input()) + 1, open('data').read(), file=sys.stdout)\nexit()",
                      stdin="17\n", files={"data": "ü"})
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("ok", "18 ü\n", "")
    assert outcome.cpu > 0 and outcome.memory > 1 << 20


@pytest.mark.parametrize("text,status,code", [
    ("1 / 0", "error", 1), ("raise SystemExit(3)", "error", 3), ("def f(:", "error", 1), ("\ud800", "error", 1),
    ("import os; os.abort()", "killed", -6), ("import ctypes; ctypes.string_at(0)", "killed", -11)])
def test_how_programs_end(box, text, status, code):
    outcome = box.run(text)
    assert (outcome.status, outcome.code) == (status, code)


def test_endless_loops_and_sleep(box):
    assert box.run("while True: pass", limits=Limits(cpu=1)).status == "timeout"
    start = time.monotonic()
    assert box.run("import time; time.sleep(1000)", limits=Limits(wall=0.5)).status == "timeout"
    assert box.run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
                   limits=Limits(cpu=1)).status in ("timeout", "killed")
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(box, stream):
    outcome = box.run(f"import sys\nwhile True: sys.{stream}.write('x' * 4096)")
    assert outcome.status == "output" and len(getattr(outcome, stream)) == Limits().output


def test_memory(box):
    outcome = box.run("x = bytearray(256 << 20)", limits=Limits(memory=128 << 20))
    assert outcome.status == "error" and "MemoryError" in outcome.stderr
    bomb = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    outcome = box.run(bomb, limits=Limits(memory=128 << 20))
    assert outcome.status in ("error", "killed") and outcome.memory < 128 << 20


def test_forks_and_threads(box):
    outcome = box.run(TRY + "import os, threading, subprocess\nattempt(os.fork)\n"
                            "attempt(threading.Thread(target=int).start)\n"
                            "attempt(lambda: subprocess.run(['/bin/true']))")
    nothing_got(outcome)
    counted = ("import os, time\nn = 0\nfor _ in range(50):\n    try:\n        if os.fork() == 0: time.sleep(30)\n"
               "        n += 1\n    except OSError: break\nprint(n)")
    assert box.run(counted, limits=Limits(processes=4)).stdout == "3\n"  # and all of them are ended
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    start = time.monotonic()
    assert box.run(bomb, limits=Limits(processes=3, cpu=1, wall=1.5)).status in ("timeout", "killed")
    assert time.monotonic() - start < 30


def test_what_a_program_leaves_behind_ends_with_it(box):
    orphan = ("import os, time\nif os.fork() == 0:\n    os.setsid()\n"
              "    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)\n")
    start = time.monotonic()
    assert box.run(orphan, limits=Limits(processes=5, wall=60)).status == "ok"
    assert time.monotonic() - start < 30


def test_no_network(box):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        nothing_got(box.run(TRY + f"""
import socket, urllib.request
attempt(lambda: socket.create_connection(("127.0.0.1", {port}), timeout=2))
attempt(lambda: urllib.request.urlopen("http://127.0.0.1:{port}", timeout=2))
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_PACKET, socket.AF_NETLINK, 40):
    attempt(lambda: socket.socket(family, socket.SOCK_DGRAM))
attempt(lambda: socket.getaddrinfo("example.org", 80))
"""))


def test_nothing_of_the_machine_can_be_read(box, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "hush")
    (tmp_path / "private").write_text("hush")
    # The folder of the project holds the interpreter in a usual clone (.venv), and the way to that is there.
    elsewhere = [f for f in (os.getcwd(),) if not Path(sys.prefix).resolve().is_relative_to(Path(f).resolve())]
    outcome = box.run(TRY + f"""
import os
for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/proc/self/environ", "/proc/1/environ",
             "/proc/{os.getpid()}/environ", "/proc/{os.getppid()}/environ", "/sys/kernel/version", "/dev/shm/x",
             "/dev/tty", {str(tmp_path / 'private')!r}, {__file__!r}):
    attempt(lambda: open(path).read())
for folder in ("/home", "/proc", "/sys", "/dev/shm", {str(tmp_path)!r}, *{elsewhere!r}):
    attempt(lambda: os.listdir(folder))
""")
    nothing_got(outcome)
    seen = box.run("import os; print(sorted(os.environ.values()), os.getcwd(), os.listdir('.'))").stdout
    assert "hush" not in seen and os.getcwd() not in seen
    assert "/scratch" in seen and "main.py" in seen


def test_nothing_but_the_scratch_folder_can_be_written(box):
    outcome = box.run(TRY + """
import os, sys
for folder in ("/", "/usr/lib", "/lib", "/etc", "/dev", os.path.dirname(os.__file__), os.path.dirname(sys.executable)):
    attempt(lambda: open(os.path.join(folder, "mine"), "w"))
attempt(lambda: open(os.__file__, "a"))
attempt(lambda: os.remove(os.__file__))
attempt(lambda: os.chmod(os.__file__, 0o777))
attempt(lambda: os.mknod("device", 0o660 | 0o060000, os.makedev(8, 0)))
""")
    nothing_got(outcome)
    written = box.run("import os, tempfile; open('mine', 'w').write('x')\n"
                      "open(tempfile.gettempdir() + '/too', 'w').write('y'); print(sorted(os.listdir('/scratch')))")
    assert written.stdout == "['main.py', 'mine', 'too']\n"
    assert box.run("import os; print(os.listdir('/scratch'))").stdout == "['main.py']\n"  # gone with the program
    full = box.run("f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()")
    assert full.status in ("error", "killed")
    many = box.run("for i in range(100000): open(str(i), 'w').close()")
    assert many.status == "error" and "No space" in many.stderr


def test_symlinks_lead_nowhere(box, tmp_path):
    (tmp_path / "private").write_text("hush")
    nothing_got(box.run(TRY + f"""
import os
for i, target in enumerate(("/etc/passwd", {str(tmp_path / 'private')!r}, "../../../../etc/passwd",
                            "/proc/1/root/etc/passwd", "/proc/self/cwd/../etc/passwd")):
    os.symlink(target, f"link{{i}}")
    attempt(lambda: open(f"link{{i}}").read())
    attempt(lambda: open(f"link{{i}}", "w"))
attempt(lambda: os.link("/usr/lib/os-release", "hard"))
"""))
    assert (tmp_path / "private").read_text() == "hush"


def test_no_signal_reaches_the_parent(box):
    outcome = box.run(TRY + f"""
import os, signal
for pid in (os.getppid(), 1, {os.getpid()}, {os.getppid()}, -{os.getpgid(0)}, -1):
    for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):
        try:
            os.kill(pid, sent)
        except OSError:
            pass
print("still here")
""")
    assert (outcome.status, outcome.stdout) == ("ok", "still here\n")


def test_no_way_back_to_privileges(box):
    nothing_got(box.run(TRY + """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)
    return name
attempt(lambda: call("unshare", 0x10000000))
attempt(lambda: call("mount", b"proc", b"/scratch", b"proc", 0, None))
attempt(lambda: call("mount", None, b"/", None, 32 | 4096, None))
attempt(lambda: call("umount2", b"/usr/lib", 2))
attempt(lambda: call("ptrace", 16, 1, 0, 0))
attempt(lambda: call("chroot", b"/scratch"))
attempt(lambda: call("setns", 0, 0))
attempt(lambda: call("sethostname", b"mine", 4))
attempt(lambda: os.setuid(0))
attempt(lambda: os.setgid(0))
attempt(lambda: os.nice(-5))
import resource
attempt(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (100, 100)))
attempt(lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)))
"""))


def test_megabytes_of_program(box):
    assert box.run("x = '" + "a" * (5 << 20) + "'").status == "error"
    assert box.run("(" * 10_000 + ")" * 10_000).status in ("error", "killed")
    with pytest.raises(ValueError, match=r"limits\.disk"):
        box.run("1", stdin="x" * (9 << 20))


def test_many_at_once_and_in_order(box):
    outcomes = box.map([Program(text=f"print({i})") for i in range(6)])
    assert [o.stdout for o in outcomes] == [f"{i}\n" for i in range(6)]
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append(box.run(f"print({i})").stdout)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(found) == ["0\n", "1\n", "2\n", "3\n"]


def test_the_same_program_says_the_same(box):
    text = "print(hash('x'), list({'a', 'b', 'c', 'd'}))"
    assert box.run(text).stdout == box.run(text).stdout


def test_a_dead_runner_is_replaced(box):
    runner = box._idle.get()
    runner = runner or module._Runner()
    runner.process.kill()
    runner.process.wait()
    box._idle.put(runner)
    assert box.run("print(1)").stdout == "1\n"


def test_no_zombies_are_left(box):
    box.run("import time; time.sleep(5)", limits=Limits(wall=0.3))
    for _ in range(box.workers):
        runner = box._idle.get()
        box._idle.put(runner)
        if runner is not None:
            pid = runner.process.pid
            assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


def test_packages(box, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "mine.py").write_text("VALUE = 3")
    with Sandbox(workers=1, packages=[tmp_path]) as box:
        assert box.run("import mine; print(mine.VALUE)").stdout == "3\n"
        assert box.run(f"open({str(tmp_path / 'mine.py')!r}, 'w')").status == "error"


def test_where_nothing_is_allowed_it_refuses(monkeypatch):
    monkeypatch.setattr(module.platform, "system", lambda: "Plan9")
    with pytest.raises(SandboxUnavailable, match=r"Plan9.*unsafe=True"):
        Sandbox()
    monkeypatch.undo()
    monkeypatch.setattr(module, "_visible", lambda packages: ["/no/such/library"])
    with pytest.raises(SandboxUnavailable, match=r"cannot be shut in here: .*no/such/library"):
        Sandbox()


def test_unsafe_keeps_the_limits():
    with Sandbox(workers=1, unsafe=True) as box:
        assert box.run("print(input())", stdin="x").stdout == "x\n"
        assert box.run("import time; time.sleep(1000)", limits=Limits(wall=0.5)).status == "timeout"
        assert box.run("while True: print('x' * 100)").status == "output"
        assert "MemoryError" in box.run("x = bytearray(1 << 29)", limits=Limits(memory=1 << 28)).stderr
        assert "PYTHONPATH" not in box.run("import os; print(os.environ)").stdout


@pytest.mark.parametrize("build", [
    lambda: Limits(cpu=0), lambda: Limits(memory=-1), lambda: Sandbox(workers=0),
    lambda: Sandbox(packages=["/no/such"]), lambda: Program(text="", files={"../x": ""}),
    lambda: Program(text="", files={"main.py": ""})])
def test_settings(build):
    with pytest.raises(ValueError):
        build()
