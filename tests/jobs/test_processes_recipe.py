"""A whole recipe over two processes by launch/local.sh: training takes both, other stages one; a loss is a restart."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.recipe import Call, MeshShape, Recipe, Saving
from distill_jax.traces.store import CorruptShard, TraceStore
from distill_jax.train.checkpoint import complete_steps
from tests.jobs.stage_calls import die_once, look, refuse
from tests.jobs.teachers import small_stage
from tests.launch.slurm import slurm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return small_stage(tmp_path_factory.mktemp("world"), saving=Saving(steps=2, keep=4))


def local(tmp_path, stages, *options):
    recipe = Recipe(name="r", runs=str(tmp_path), mesh=MeshShape(data=1, fsdp=-1), stages=stages)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    done = subprocess.run(
        [ROOT / "launch/local.sh", path, *options], cwd=ROOT, timeout=500, capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                          "XLA_FLAGS": "--xla_backend_optimization_level=0"})
    return done, recipe.folder


def test_a_process_that_is_lost_is_a_restart_of_all(stage, tmp_path):
    stages = (stage, Call(name="die", fn=die_once), Call(name="look", fn=look, kwargs={"run": "stage:train"}))
    done, folder = local(tmp_path, stages, "--restarts", "1", "--devices", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "process 1: process 0 is gone; ending with code 75" in done.stderr
    assert "a process was lost; starting all 2 again from the last checkpoint (0 more times)" in done.stderr
    assert "[train] done" in done.stdout and done.stdout.count("[train] start") == 1
    said = json.loads((folder / "look" / "done.json").read_text())["result"]
    assert said == {"width": 16, "steps": [2, 4]}
    assert (folder / "look" / "looked").read_text() == "once\n", "process 0 alone"
    lines = (folder / "train" / "metrics" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4], "written by process 0 alone"


def test_a_job_of_slurm(stage, tmp_path):
    """The batch script, as SLURM would run it on two tasks: they find each other by SLURM's variables alone."""
    recipe = Recipe(name="r", runs=str(tmp_path), mesh=MeshShape(data=1, fsdp=-1), stages=(stage,))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DISTILL_JAX", "XLA"))}
    done = subprocess.run(
        [ROOT / "launch/slurm.sbatch", path, "--nodes", "2"], cwd=ROOT, timeout=500, capture_output=True, text=True,
        env=clean | {"PATH": f"{slurm(tmp_path)}:{clean['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
                     "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
                     "--xla_backend_optimization_level=0"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("[train] done") == 1
    assert complete_steps(recipe.stage_folder("train") / "checkpoints") == [2, 4]
    assert not (tmp_path / "scontrol.log").exists()


def test_a_bad_shard_that_is_skipped_is_said_once_by_the_first_process_and_both_go_on(stage, tmp_path):
    store = Path(stage.source.path)
    shutil.copytree(store, tmp_path / "store")
    next((tmp_path / "store" / "data").glob("000001-*/tokens/c.0.0.0")).unlink()
    source = dataclasses.replace(stage.source, path=str(tmp_path / "store"), bad_shards="skip")
    done, folder = local(tmp_path, (dataclasses.replace(stage, source=source),), "--devices", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if "cannot be read" in line]
    assert len(said) == 1 and "store: shard 1: 8 of its 8 rows cannot be read and are left out" in said[0]
    lines = [json.loads(line) for line in (folder / "metrics" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["lost_rows"] == 8
    assert lines[-1]["bad_shards"] == 1 and all(np.isfinite(line["loss"]) for line in lines)


def damage_row(folder, row):
    """Flip a byte of the store that belongs to this row's tokens alone."""
    bad = lambda: {i for i in range(len(TraceStore.open(folder))) if not readable(folder, i)}
    for file in sorted(folder.glob("data/*/tokens/c.0.0.0")):
        whole = file.read_bytes()
        for at in range(0, len(whole), 11):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
            if not readable(folder, row) and bad() == {row}:
                return
        file.write_bytes(whole)
    raise AssertionError(f"no byte of row {row} alone")


def readable(folder, row):
    try:
        return bool(TraceStore.open(folder).read([row]))
    except CorruptShard:
        return False


def test_a_bad_shard_that_one_process_meets_ends_both(stage, tmp_path):
    shutil.copytree(stage.source.path, tmp_path / "store")
    source = dataclasses.replace(stage.source, path=str(tmp_path / "store"))
    opened = open_source(source, load_tokenizer(stage.providers["student"].model), seed=0)
    rows = lambda step, part: set(np.unique(opened.batch(step, part).main.row_ids).tolist()) - {-1}
    row = min(rows(1, slice(4, 8)) - rows(0, slice(0, 8)) - rows(1, slice(0, 4)))
    damage_row(tmp_path / "store", row)
    done, _ = local(tmp_path, (dataclasses.replace(stage, source=source),), "--restarts", "3", "--devices", "2")
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"row {row}: " in done.stderr and "starting all" not in done.stderr
    assert "process 0: process 1 (" in done.stderr and "ending with code 75" in done.stderr


def test_an_error_is_no_reason_to_start_again(tmp_path):
    done, folder = local(tmp_path, (Call(name="refuse", fn=refuse),), "--restarts", "3", "--devices", "1")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: this stage wants nothing" in done.stderr and "starting all" not in done.stderr
    assert "ended at" in done.stderr and "ValueError: this stage wants nothing; ending with code 75" in done.stderr
    assert not (folder / "refuse" / "done.json").exists()


@pytest.mark.parametrize("options,line", [
    (["--processes", "0"], "usage: "), (["--devices", "four"], "--devices four: expected a whole number"),
    (["--restart", "1"], "unknown option --restart")])
def test_options_that_make_no_sense(tmp_path, options, line):
    done = subprocess.run([ROOT / "launch/local.sh", "r.yaml", *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and line in done.stderr
