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


def test_small_experts(tmp_path):
    """Both ways agree, and tiles have the smaller temporaries."""
    out = tmp_path / "experts.json"
    command = [sys.executable, "-m", "benchmarks.experts", "--small", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "XLA_FLAGS": ""})
    [case] = json.loads(out.read_text())["cases"]
    assert case["results"]["difference"] < 1e-5
    assert case["results"]["tiles"]["temp_gb"] < 0.5 * case["results"]["ragged"]["temp_gb"]


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


def test_small_train():
    """Both losses run, and say how fast."""
    small = ["--sizes", "tiny", "--rows", "2", "--length", "64", "--steps", "1"]
    command = [sys.executable, "-m", "benchmarks.train", *small]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env={
        **os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"})
    about, *rows = map(json.loads, done.stdout.splitlines())
    assert about["what"] == "run" and [r["loss_kind"] for r in rows] == ["ce", "kd"]
    assert all(r["tokens_per_second"] > 0 and 0 < r["loss"] < 8 for r in rows)


def test_modelled_efficiency_by_hand():
    """An all-gather of 8 GB among 8 devices of one host sends 7 GB at 450 GB/s; among 16 hosts' replicas 2 * 15/16."""
    from benchmarks.scaling import Times, mesh_of, seconds_of
    from distill_jax.jobs.hardware import DEVICES, parse
    from distill_jax.sharding.hlo import Collective

    target, made = parse("h200:128"), {"shapes": (), "bytes": 8e9, "loops": (), "op": "", "name": ""}
    inside = Collective(kind="all-gather", group=8, **made)
    across = Collective(kind="all-reduce", group=16, **made)
    assert seconds_of(inside, target) == pytest.approx(7e9 / 450e9)
    assert seconds_of(across, target) == pytest.approx(2 * 15 / 16 * 8e9 / 50e9)
    assert mesh_of(target.device, 128).sizes == {"data": 16, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert mesh_of(DEVICES["v5p"], 128).fsdp == 16
    times = Times(compute=3.0, sending=1.0)
    assert times.apart == 0.75 and times.together == 1.0 and Times(compute=1.0, sending=2.0).together == 0.5
