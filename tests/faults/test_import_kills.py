"""SIGKILL an import at random moments; what it ends up with is what an undisturbed one makes, to the byte."""

import json
import sys
import time
from pathlib import Path

import pytest

from distill_jax.cli.main import main
from distill_jax.traces.store import TraceStore
from tests.data.conftest import tiny_folder
from tests.faults.campaign import Report, differences, run_killed

ROOT = Path(__file__).resolve().parents[2]


def rows(count: int) -> list[str]:
    """Right, wrong, cut and broken rows; every tenth needs algebra."""
    out = []
    for i in range(count):
        answer = f"\\boxed{{{i}+x}}" if i % 10 == 0 else f"\\boxed{{{i + (i % 3 == 0)}}}"
        response = f"<think>\nhm {i} {'so ' * (i % 50)}" + ("" if i % 17 == 0 else f"\n</think>\n\n{answer}")
        row = {"question": f"q{i}", "gt": f"x+{i}" if i % 10 == 0 else str(i), "response": response}
        out.append("{broken" if i % 41 == 40 else json.dumps(row))
    return out


def campaign(folder: Path, *, count: int, kills: int, seed: int) -> Report:
    source = folder / "in.jsonl"
    source.write_text("\n".join(rows(count)))
    tokenizer = tiny_folder(folder / "tok")
    arguments = lambda out: ["import", str(source), "--tokenizer", str(tokenizer), "--out", str(folder / out),
                             "--workers", "1", "--shard-rows", "16"]
    begun = time.monotonic()
    with pytest.raises(SystemExit):
        main(arguments("undisturbed"))
    span = time.monotonic() - begun  # of the work alone: everything is imported here
    files = lambda: sum(1 for p in (folder / "killed").rglob("*") if p.is_file())
    report = run_killed([sys.executable, "-m", "distill_jax", *arguments("killed")], kills=kills, seed=seed,
                        window=(0.0, 1.5 * span / (kills + 1)), env={"PYTHONPATH": str(ROOT)}, progress=files)
    store = TraceStore.open(folder / "killed")
    store.verify()
    assert store.complete and differences(folder / "undisturbed", folder / "killed") == []
    summary = json.loads((folder / "killed/summary.json").read_text())
    assert summary["rows_in"] == count and summary["traces"] == summary["kept"] + sum(summary["rejected"].values())
    return report


def test_two_kills(tmp_path):
    assert campaign(tmp_path, count=1500, kills=2, seed=0).kills >= 1


@pytest.mark.faults_long
def test_twenty_kills(tmp_path):
    report = campaign(tmp_path, count=6000, kills=20, seed=1)
    assert report.kills >= 10, report
