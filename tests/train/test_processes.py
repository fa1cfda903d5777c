"""Two processes of four devices train as one process of eight; a signal to one of them stops both at one step."""

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
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.sharding import make_mesh
from distill_jax.train.checkpoint import latest_params, latest_step
from distill_jax.train.feed import row_share
from distill_jax.train.loop import Run, fit
from tests.train.tiny import CE, Synthetic, setup

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launch(folder, cache, slow=0.0):
    port = str(free_port())
    return [subprocess.Popen(
        [sys.executable, "-m", "tests.train.worker", str(folder), str(STEPS), "--process", str(i), "--processes", "2",
         "--devices", "4", "--port", port, "--cache", str(cache)],
        cwd=ROOT, env=os.environ | {"SLOW": str(slow)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)]


def finish(processes):
    outputs = [p.communicate(timeout=400)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(o[-3000:] for o in outputs)
    return outputs


def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    run = Run(folder=tmp_path / "one", steps=STEPS, log_every=4, save_every=5)
    config, state = setup(CE, make_mesh(data=-1, fsdp=2), total=20)
    fit(config, state, Synthetic(), run)

    two, metrics = tmp_path / "two", tmp_path / "two" / "metrics" / "train.jsonl"
    processes = launch(two, tmp_path / "cache", slow=0.3)
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # only the one that writes no files
    outputs = finish(processes)
    stopped = latest_step(two / "checkpoints")
    assert 4 <= stopped < STEPS, outputs[0]
    assert f"a signal to another process: saved after update {stopped} of {STEPS}" in outputs[0]
    finish(launch(two, tmp_path / "cache"))

    ours, theirs = (latest_params(tmp_path / name / "checkpoints") for name in ("one", "two"))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    first = [json.loads((tmp_path / n / "metrics" / "train.jsonl").read_text().splitlines()[0]) for n in ("one", "two")]
    np.testing.assert_allclose(first[0]["loss"], first[1]["loss"], rtol=1e-5)


def test_row_share_of_one_process():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert row_share(NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 8) == (0, 1)
