"""SIGKILL the parts of `ops` at random moments: the joined store is that of an undisturbed process, to the byte, and a
kill makes one shard at most be done again."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from distill_jax.cli.main import main
from distill_jax.data.tokenizer import load_tokenizer
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.faults.campaign import differences, run_killed

ROOT = Path(__file__).resolve().parents[2]
SHARD = 8


def campaign(folder: Path, *, count: int, parts: int, kills: int, seed: int) -> int:
    """Kills sent. Every trace costs 10 ms and leaves a line."""
    tok = load_tokenizer(tiny_folder(folder / "tok"))
    make_store(folder / "source", some_traces(count), tok)
    log = folder / "log"
    slow = f"tests.jobs.some_ops:Slow: {{seconds: 0.01, log: {log}}}"
    arguments = lambda out, op: ["ops", str(folder / "source"), "--op", op, "--op", "strip_thinking", "--out",
                                 str(folder / out), "--shard-rows", str(SHARD)]
    done = lambda: len(log.read_text()) if log.exists() else 0
    sent = 0
    for i in range(parts):
        command = [sys.executable, "-m", "distill_jax", *arguments("parts", slow), "--part", f"{i}/{parts}"]
        sent += run_killed(command, kills=kills, seed=seed + i, window=(0.0, 0.012 * count / parts / (kills + 1)),
                           env={"PYTHONPATH": str(ROOT)}, progress=done).kills
    lines = Counter(log.read_text().split())
    assert len(lines) == count and sum(lines.values()) - count <= SHARD * sent
    for command in (["store", "join", str(folder / "parts")], arguments("one", slow)):
        with pytest.raises(SystemExit) as e:
            main(command)
        assert not e.value.code
    assert differences(folder / "one", folder / "parts") == []
    return sent


def test_kills_of_two_parts(tmp_path):
    assert campaign(tmp_path, count=200, parts=2, kills=2, seed=0) >= 2


@pytest.mark.faults_long
def test_kills_of_four_parts(tmp_path):
    assert campaign(tmp_path, count=800, parts=4, kills=5, seed=1) >= 10
