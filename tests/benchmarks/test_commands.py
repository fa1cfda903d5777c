"""The commands of the benchmarks start: their options parse, and the small sizes run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if "def main" in p.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_parse(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_small_loss(tmp_path):
    """The three sides agree, and the lifted one has the smallest temporaries."""
    out = tmp_path / "loss.json"
    command = [sys.executable, "-m", "benchmarks.loss", "--small", "--repeats", "1", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "XLA_FLAGS": ""})
    results = json.loads(out.read_text())["results"]
    assert all(r["difference"] < 1e-4 for r in results.values())
    assert results["lifted"]["temp_gb"] < 0.5 * results["naive"]["temp_gb"]
