"""SIGKILL a store writer at random moments; the store it ends up with is that of an undisturbed run, to the byte."""

import sys
from pathlib import Path

import pytest

from distill_jax.traces.store import TraceStore
from tests.faults.campaign import Report, differences, run_killed
from tests.faults.write_store import main

ROOT = Path(__file__).resolve().parents[2]


def campaign(folder: Path, *, rows: int, kills: int, seed: int) -> Report:
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    main(str(undisturbed), rows)
    command = [sys.executable, "-m", "tests.faults.write_store", str(killed), str(rows)]
    count = lambda: sum(1 for p in killed.rglob("*") if p.is_file())
    report = run_killed(command, kills=kills, seed=seed, window=(0.0, 0.12), env={"PYTHONPATH": str(ROOT)},
                        progress=count)
    store = TraceStore.open(killed)
    store.verify()
    assert len(store) == rows and store.complete
    assert differences(undisturbed, killed) == []
    return report


def test_three_kills(tmp_path):
    report = campaign(tmp_path, rows=250, kills=3, seed=0)
    assert report.kills == 3 and report.runs == 4


@pytest.mark.faults_long
def test_twenty_kills(tmp_path):
    report = campaign(tmp_path, rows=900, kills=20, seed=1)
    assert report.kills == 20, report


def test_differences_notices(tmp_path):
    for name, text in (("a/x", "1"), ("a/y", "1"), ("b/x", "1"), ("b/y", "2"), ("b/z", "3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert differences(tmp_path / "a", tmp_path / "b") == [f"only in {tmp_path / 'b'}: z", "differs: y"]


def test_a_failing_command_is_reported():
    with pytest.raises(AssertionError, match=r"exit 3 after 0 kills:\nbad"):
        run_killed([sys.executable, "-c", "print('bad'); raise SystemExit(3)"], kills=1, seed=0, window=(30.0, 30.0))
