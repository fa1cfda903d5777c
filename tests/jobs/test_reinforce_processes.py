"""RL over two processes of four devices is RL over one of eight: the same answers, the same parameters."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from distill_jax.jobs.estimates import load_estimates
from distill_jax.rollout.environments import Plain
from distill_jax.traces.store import TraceStore
from distill_jax.train.checkpoint import latest_params
from tests.jobs.test_critic import ppo
from tests.jobs.test_reinforce import recipe, world  # noqa: F401  (world is a fixture)

ROOT = Path(__file__).resolve().parents[2]


METHODS = {"group": lambda start, runs: recipe(start, runs, steps=2, environment=Plain()),
           "critic": lambda start, runs: ppo(start, runs, rows=16, every=1, steps=2)}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_sample_and_train_as_one(world, tmp_path, method):  # noqa: F811
    for processes, devices in ((1, 8), (2, 4)):
        r = METHODS[method](world, tmp_path / str(processes))
        path = tmp_path / f"{processes}.yaml"
        path.write_text(r.to_yaml())
        done = subprocess.run(
            [ROOT / "launch/local.sh", path, "--processes", str(processes), "--devices", str(devices)], cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}, timeout=900,
            capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = (tmp_path / n / "rl" for n in "12")
    for update in ("0000000", "0000001"):
        answers = [list(TraceStore.open(str(f / "rollouts" / update)).traces()) for f in (one, two)]
        assert [t.encoded.ids.tolist() for t in answers[0]] == [t.encoded.ids.tolist() for t in answers[1]]
        for a, b in zip(*answers, strict=True):
            assert a.scores == pytest.approx(b.scores, rel=1e-4, abs=1e-5)
        if method == "critic":
            said = [load_estimates(f / "rollouts" / f"{update}.npz") for f in (one, two)]
            assert {"advantages", "returns"} <= set(said[0]) == set(said[1])
            for name in said[0]:
                np.testing.assert_allclose(*(np.concatenate(s[name]) for s in said), rtol=1e-3, atol=1e-5)
    for provider in ("student", "critic")[:1 + (method == "critic")]:
        ends = (jax.tree.leaves(latest_params(f / "checkpoints", provider)) for f in (one, two))
        for a, b in zip(*ends, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
