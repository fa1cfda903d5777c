"""SIGKILL training at random moments, checkpoints being written included; the end is that of an undisturbed run."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from distill_jax.train.checkpoint import latest_step
from tests.faults.campaign import Report, run_killed

ROOT = Path(__file__).resolve().parents[2]


def everything(folder: Path, step: int) -> list[np.ndarray]:
    """All arrays of a checkpoint: parameters, optimiser, controllers, counters."""
    found = []
    for item in ("params/student", "opt_state", "loop"):
        tree = ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(step) / item)
        found += [np.asarray(x) for x in jax.tree.leaves(tree)]
    return found


def campaign(folder: Path, *, steps: int, kills: int, seed: int) -> Report:
    """A checkpoint every second step of about 0.03 s: most of the time one is being written."""
    env = {"PYTHONPATH": str(ROOT), "SLOW": "0.03"}
    command = [sys.executable, "-m", "tests.train.worker", "RUN", str(steps), "--save-every", "2",
               "--cache", str(folder / "compiled")]
    place = lambda name: [str(folder / name) if word == "RUN" else word for word in command]
    subprocess.run(place("undisturbed"), env=os.environ | env, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    checkpoints = folder / "killed" / "checkpoints"
    count = lambda: sorted(p.name for p in checkpoints.iterdir()) if checkpoints.exists() else []
    report = run_killed(place("killed"), kills=kills, seed=seed, window=(0.0, 0.5), env=env, progress=count)
    assert latest_step(checkpoints) == steps
    for a, b in zip(everything(folder / "undisturbed", steps), everything(folder / "killed", steps), strict=True):
        np.testing.assert_array_equal(a, b)
    return report


def test_two_kills(tmp_path):
    report = campaign(tmp_path, steps=30, kills=2, seed=0)
    assert report.kills == 2, report


@pytest.mark.faults_long
def test_twenty_kills(tmp_path):
    report = campaign(tmp_path, steps=300, kills=20, seed=1)
    assert report.kills == 20, report
