"""Several processes train as one; a signal to one stops all at one step; when one is lost, the others end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.sharding import make_mesh
from distill_jax.train.checkpoint import latest_params, latest_step
from distill_jax.train.feed import row_share
from distill_jax.train.loop import Run, fit
from distill_jax.train.peers import RESTART
from tests.train.tiny import CE, Synthetic, setup

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launch(folder, cache, slow=0.0, processes=2, devices=4, mesh="data=-1,fsdp=2", steps=STEPS, **environ):
    port = str(free_port())
    return [subprocess.Popen(
        [sys.executable, "-m", "tests.train.worker", str(folder), str(steps), "--process", str(i), "--processes",
         str(processes), "--devices", str(devices), "--port", port, "--cache", str(cache), "--mesh", mesh],
        cwd=ROOT, env=os.environ | {"SLOW": str(slow)} | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True) for i in range(processes)]


def finish(processes, codes=None):
    outputs = [p.communicate(timeout=400)[0] for p in processes]
    assert [p.returncode for p in processes] == (codes or [0] * len(processes)), "\n".join(o[-3000:] for o in outputs)
    return outputs


def lines_of(folder):
    path = folder / "metrics" / "train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_update(folder, update, processes):
    deadline = time.monotonic() + 300
    while not any(line["step"] >= update for line in lines_of(folder)):
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, finish(processes)
        time.sleep(0.05)


def losses(folder):
    return {line["step"]: line["loss"] for line in lines_of(folder)}


def same_losses(folder, whole, rtol=1e-6):
    ours, theirs = losses(folder), losses(whole)
    assert ours.keys() == theirs.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose([ours[n] for n in sorted(ours)], [theirs[n] for n in sorted(theirs)], rtol=rtol)


def train_here(folder, sizes=(("data", -1), ("fsdp", 2)), devices=8):
    """A run of this process, from the newest checkpoint of `folder` on."""
    config, state = setup(CE, make_mesh(devices=jax.devices()[:devices], **dict(sizes)), total=20)
    return fit(config, state, Synthetic(), Run(folder=folder, steps=STEPS, log_every=1, save_every=5))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run of one process of eight devices."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_two_processes_of_four_devices_are_one_of_eight(whole, cache, tmp_path):
    processes = launch(tmp_path, cache, slow=0.3)
    wait_for_update(tmp_path, 4, processes)
    processes[1].send_signal(signal.SIGTERM)  # only the one that writes no files
    outputs = finish(processes)
    stopped = latest_step(tmp_path / "checkpoints")
    assert 4 <= stopped < STEPS, outputs[0]
    assert f"a signal to another process: saved after update {stopped} of {STEPS}" in outputs[0]
    finish(launch(tmp_path, cache))
    same_losses(tmp_path, whole)
    ours, theirs = (latest_params(folder / "checkpoints") for folder in (whole, tmp_path))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_one_is_killed_the_other_ends_for_a_restart_and_one_process_goes_on(whole, cache, tmp_path):
    processes = launch(tmp_path, cache, slow=0.3)
    wait_for_update(tmp_path, 6, processes)
    processes[1].kill()
    began = time.monotonic()
    outputs = finish(processes, [RESTART, -signal.SIGKILL])
    assert time.monotonic() - began < 30, "far less than any time limit: a killed process closes its connection"
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("process 0: ")]
    assert "process 1 (" in line and "is gone; last seen at train: " in line and f"code {RESTART}" in line
    train_here(tmp_path)
    same_losses(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 3])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_of_four_is_killed_or_stopped(whole, cache, tmp_path, how, victim):
    limits = {"DISTILL_JAX_HEARTBEAT_SECONDS": "6"}
    processes = launch(tmp_path, cache, slow=0.3, processes=4, devices=2, **limits)
    wait_for_update(tmp_path, 6, processes)
    processes[victim].send_signal(how)
    began = time.monotonic()
    try:
        others = [p for i, p in enumerate(processes) if i != victim]
        outputs = finish(others, [RESTART] * 3)
        assert time.monotonic() - began < 40
        assert all(f"process {victim}" in output.splitlines()[-1] for output in outputs), outputs
    finally:
        processes[victim].send_signal(signal.SIGCONT)
    finish([processes[victim]], [-signal.SIGKILL if how == signal.SIGKILL else RESTART])
    finish(launch(tmp_path, cache))  # two processes of four
    same_losses(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("before,after", [
    ((2, 4, "data=-1,fsdp=2"), (4, 2, "data=4,fsdp=2")), ((4, 2, "data=2,fsdp=4"), (2, 4, "fsdp=8")),
    ((1, 8, "fsdp=2,tensor=4"), (2, 4, "fsdp=4,tensor=2")), ((2, 4, "fsdp=4,tensor=2"), (1, 1, "data=1")),
    ((1, 1, "data=1"), (4, 2, "data=2,fsdp=2,tensor=2"))])
def test_written_by_some_continued_by_others(whole, cache, tmp_path, before, after):
    processes = launch(tmp_path, cache, slow=0.3, **dict(zip(("processes", "devices", "mesh"), before)))
    wait_for_update(tmp_path, 5, processes)
    processes[-1].send_signal(signal.SIGTERM)
    finish(processes)
    assert 5 <= latest_step(tmp_path / "checkpoints") < STEPS
    finish(launch(tmp_path, cache, **dict(zip(("processes", "devices", "mesh"), after))))
    same_losses(tmp_path, whole)


@pytest.mark.slow
def test_a_run_in_which_no_update_is_done_any_more_ends_with_the_stacks(cache, tmp_path):
    processes = launch(tmp_path, cache, slow=0.1, DISTILL_JAX_STALL_SECONDS="3", HANG="6")
    outputs = finish(processes, [RESTART] * 2)
    assert any("no update was done for 3 s" in line for line in outputs[0].splitlines())
    assert "Thread 0x" in "".join(outputs) and "in updates" in "".join(outputs)


def test_row_share_of_one_process():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert row_share(NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 8) == (0, 1)
