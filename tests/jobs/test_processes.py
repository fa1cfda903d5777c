"""Who a process is, by what its environment says; and the lines for environments that make no sense."""

import pytest

from distill_jax.cli.main import main
from distill_jax.jobs.processes import NAMES, Start, joined, start_of
from distill_jax.jobs.slurm import first_host, local_devices, port, tasks_on
from distill_jax.train import peers

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_ID": "12345", "SLURM_STEP_NODELIST": "gpu[07-08]",
         "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}


def explicit(*values):
    return dict(zip(NAMES, values))


def test_the_three_variables_win():
    said = explicit("node1:8476", "2", "1")
    assert start_of(said | SLURM) == Start(host="node1", port=8476, processes=2, process=1)
    assert start_of(explicit("[::1]:8476", "2", "0")).host == "::1"


def test_slurm():
    assert start_of(SLURM) == Start(host="gpu07", port=port(12345), processes=4, process=3)
    assert start_of(SLURM | {"SLURM_NTASKS": "1"}) is None
    assert start_of(SLURM | {"DISTILL_JAX_DISTRIBUTED": "auto"}) is None
    assert start_of({}) is None


@pytest.mark.parametrize("hosts,first", [
    ("node001", "node001"), ("node001,host2", "node001"), ("node[001-015],host2", "node001"),
    ("node[001,007-015]", "node001"), ("rack[1-2]n[01-04],x", "rack1n01"), ("a-b[3-4].c,d", "a-b3.c")])
def test_first_host(hosts, first):
    assert first_host(hosts) == first


def test_ports_of_jobs_and_steps():
    assert port(12345) == port(12345, 0) != port(12345, 1)
    assert all(61440 <= port(job, step) < 65535 for job in range(5000) for step in (0, 3))


def test_tasks_of_a_node():
    assert [tasks_on(n, "4(x2),2") for n in range(4)] == [4, 4, 2, 1]


@pytest.mark.parametrize("visible,on_node,devices", [
    ("0,1,2,3,4,5,6,7", "8", [4, 5, 6, 7]),  # two tasks that see all eight: halves
    ("0,1", "2", [1]),                       # one each
    ("0,1,2,3", "8", None),                  # --gpus-per-task=4: its own already
    ("0", "2", None), ("", "8", None)])
def test_gpus_of_a_task(visible, on_node, devices):
    assert local_devices(SLURM | {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node}) == devices


def test_gpus_that_do_not_divide():
    with pytest.raises(ValueError, match="3 GPUs do not divide over the 2 tasks"):
        local_devices(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_GPUS_ON_NODE": "3"})


@pytest.mark.parametrize("environ,line", [
    (explicit("node1:8476"), "DISTILL_JAX_COORDINATOR without DISTILL_JAX_PROCESSES, DISTILL_JAX_PROCESS"),
    (explicit("node1", "2", "0"), "'node1': expected host:port of process 0"),
    (explicit("node1:99999", "2", "0"), "expected host:port"),
    (explicit("node1:80", "two", "0"), "expected two whole numbers"),
    (explicit("node1:80", "2", "2"), "DISTILL_JAX_PROCESS=2 with DISTILL_JAX_PROCESSES=2: .* from 0 to 1"),
    ({"SLURM_NTASKS": "2"}, "no SLURM_PROCID and node list: start the tasks with srun"),
    ({"DISTILL_JAX_DISTRIBUTED": "yes"}, "the only value is auto")])
def test_environments_that_make_no_sense(environ, line):
    with pytest.raises(ValueError, match=line), joined(environ):
        pass
    assert peers.current() is peers.ALONE


@pytest.mark.parametrize("options,line", [
    (["--processes", "2"], "DISTILL_JAX_PROCESSES without DISTILL_JAX_COORDINATOR, DISTILL_JAX_PROCESS"),
    (["--coordinator", "nowhere.invalid:9", "--processes", "2", "--process", "1"],
     "'nowhere.invalid' does not resolve")])
def test_options_of_the_command(tmp_path, capsys, monkeypatch, options, line):
    monkeypatch.setenv("DISTILL_JAX_START_SECONDS", "0.3")
    with pytest.raises(SystemExit) as end:
        main(["train", str(tmp_path / "recipe.yaml"), *options])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and line in error and "\n" not in error


def test_an_absent_process_is_a_reason_to_start_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DISTILL_JAX_START_SECONDS", "0.3")
    with pytest.raises(SystemExit) as end:
        main(["train", str(tmp_path / "r.yaml"), "--coordinator", "localhost:9", "--processes", "2", "--process", "1"])
    error = capsys.readouterr().err.strip()
    assert end.value.code == peers.RESTART and "\n" not in error
    assert error.startswith("error: process 0 did not answer at localhost:9 within 0.3 s")


def test_the_only_process_meets_nobody():
    with joined(explicit("node1:8476", "1", "0")):
        assert peers.current() is peers.ALONE
