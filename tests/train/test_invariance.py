"""Gradients do not depend on micro-batches, devices, the mesh or packing: 1e-6 in float32, 1e-11 in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.invariance import CUTS, differences

ROOT = Path(__file__).resolve().parents[2]


def test_float64_gradient_is_the_same_to_1e11():
    done = subprocess.run([sys.executable, "-m", "tests.train.invariance"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found) == set(CUTS)
    assert max(found.values()) < 1e-11, found


SOME = ("2 data x 2 fsdp x 2 tensor, 2 micro-batches", "unpacked")


def test_float32_gradient_is_the_same_to_1e6():
    found = differences("float32", SOME)
    assert max(found.values()) < 1e-6, found


@pytest.mark.slow
def test_float32_gradient_is_the_same_to_1e6_every_way():
    found = differences("float32", tuple(set(CUTS) - set(SOME)))
    assert max(found.values()) < 1e-6, found
