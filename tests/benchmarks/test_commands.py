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


def test_small_rollout(tmp_path):
    """The engine writes the same tokens with and without its savings, and computes each prompt of a group once."""
    out = tmp_path / "rollout.json"
    command = [sys.executable, "-m", "benchmarks.rollout", "--small", "--no-torch", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={
        **os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"})
    result = json.loads(out.read_text())["result"]
    usage = result["usage"]
    assert usage["ours"]["prompts"] == 4 and usage["without_both"]["prompts"] == 16
    assert usage["ours"]["passes"] < usage["without_both"]["passes"]
    gap = {dtype: said["largest"] for dtype, said in result["log_prob_gap"].items()}
    assert gap["float32"] < 1e-4 and gap["bfloat16"] < 0.5
