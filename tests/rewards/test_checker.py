import os
import signal
import threading
import time

import pytest

from distill_jax.rewards.check import Verdict
from distill_jax.rewards.checker import Checker, Query
from distill_jax.rewards.journal import Journal, verdict_key
from distill_jax.rewards.verify import verify
from distill_jax.traces.trace import simple_trace

HANGS = "\\boxed{9^{9^{9^{9^{9}}}}}"  # sympy computes this for ever


@pytest.fixture(scope="module")
def checker():
    with Checker(workers=2, timeout=1.0) as c:
        yield c


def test_order_is_kept_and_a_hung_worker_is_replaced(checker):
    before = checker.timeouts
    queries = [Query(completion=f"\\boxed{{{i}+x}}", golds=[f"x+{i}"]) for i in range(5)]
    queries.insert(2, Query(completion=HANGS, golds=["9"]))
    queries.append(Query(completion="4", golds=["4"]))
    out = checker.map(queries)
    assert [v.correct for v in out] == [True, True, None, True, True, True, True]
    assert out[2] == Verdict(correct=None, extracted=HANGS[7:-1], method="timeout", timed_out=True)
    assert checker.timeouts == before + 1 and out[-1].method == "exact"
    assert checker.check("\\boxed{1+x}", "x+1").correct


def test_from_many_threads(checker):
    out = {}
    threads = [threading.Thread(target=lambda i=i: out.update({i: checker.check(f"\\boxed{{{i}+y}}", f"y+{i}")}))
               for i in range(6)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert len(out) == 6 and all(v.correct for v in out.values())


def test_a_dead_worker_is_a_crash_and_not_a_verdict():
    with Checker(workers=1, timeout=5.0) as c:
        assert c.check("\\boxed{1+x}", "x+1").correct
        worker = c._idle.get()
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        c._idle.put(worker)
        verdict = c.check("\\boxed{2+x}", "x+2")
        assert (verdict.correct, verdict.method, c.crashes) == (None, "crash", 1)
        assert c.check("\\boxed{2+x}", "x+2").correct  # in a new process


def test_a_stopped_worker_meets_the_wall_clock(monkeypatch):
    monkeypatch.setattr("distill_jax.rewards.checker.WALL", 1.0)
    with Checker(workers=1, timeout=0.5) as c:
        c.check("\\boxed{1+x}", "x+1")
        worker = c._idle.get()
        os.kill(worker.process.pid, signal.SIGSTOP)  # no CPU time passes
        c._idle.put(worker)
        begun = time.monotonic()
        assert c.check("\\boxed{2+x}", "x+2").timed_out and time.monotonic() - begun < 20


def test_settings():
    with pytest.raises(ValueError, match="positive timeout"):
        Checker(timeout=0)


def test_journal_survives_a_torn_line(tmp_path):
    path = tmp_path / "deep" / "verdicts.jsonl"
    journal = Journal(path)
    v = Verdict(correct=None, extracted="x", method="timeout", timed_out=True)
    journal.add([("a", v), ("b", Verdict(correct=True, extracted="2", method="math"))])
    with open(path, "ab") as f:
        f.write(b'{"key": "c", "verd')
    again = Journal(path)
    assert len(again) == 2 and again.get("a") == v and again.get("c") is None
    again.add([("c", v)])
    assert Journal(path).get("c") == v and path.read_bytes().count(b"\n") == 3


def test_key_depends_on_text_gold_and_kind():
    keys = [verdict_key("t", ["1"]), verdict_key("u", ["1"]), verdict_key("t", ["2"]), verdict_key("t", ["1"], "math")]
    assert len(set(keys)) == 4


def test_verify_asks_once_and_a_restart_repeats_the_first_decision(tmp_path, checker):
    traces = [simple_trace("q", "hm", HANGS, gold="9"), simple_trace("q", "hm", "\\boxed{1+x}", gold="x+1"),
              simple_trace("q", "", "5", gold="4"), simple_trace("q", "", "5", verdict=True),
              simple_trace("q", "hm", "", gold="4", flags=("unterminated_think",)),
              simple_trace("q", "", "Answer: Ann", gold="4", meta={"golds": ["Ann"]})]
    journal = Journal(tmp_path / "v.jsonl")
    out = verify(traces, checker, journal)
    assert [t.verdict for t, _ in out] == [None, True, False, True, False, True]
    assert [v.method for _, v in out] == ["timeout", "math", "number", "no_gold", "unterminated", "exact"]
    assert out[2][0].meta == {"check": "number", "extracted": "5"} and traces[2].meta == {}
    assert len(journal) == 2

    class Unreachable:
        def settle(self, pending):
            assert not pending
            return []

    assert verify(traces, Unreachable(), Journal(journal.path)) == out
