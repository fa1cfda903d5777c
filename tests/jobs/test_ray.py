"""`--ray`: parts as Ray Data tasks on a cluster of two nodes, one of which is killed in the middle."""

import contextlib
import json
import os
import signal
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from distill_jax.cli.main import main
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.ops import OpsJob, run_ops
from distill_jax.jobs.parts import join
from distill_jax.jobs.ray_parts import RayCluster, ops_on_ray, run_parts
from distill_jax.jobs.score import ScoreJob, score
from distill_jax.traces.ops.strip_thinking import StripThinking
from distill_jax.traces.store import TraceStore
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.some_ops import Slow, score_slowly
from tests.jobs.stub_server import said, serving
from tests.jobs.teachers import teacher_folder

pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'distill_jax[ray]' (make ray)")
pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
PARTS = 4
STORE = 80 * 2**20


def children(pid: int) -> list[int]:
    return [int(c) for thread in Path(f"/proc/{pid}/task").iterdir()
            for c in (thread / "children").read_text().split()]


class Nodes:
    """A head without processors, and two nodes of one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        notice = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        self.cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "object_store_memory": STORE, "_system_config": notice})
        self.workers = [self.cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]

    @property
    def address(self) -> str:
        return self.cluster.address

    @contextlib.contextmanager
    def killing(self, ready):
        """SIGKILLs a node with its tasks once `ready()`, while the block runs; the block has to last that long."""
        over, killed = threading.Event(), []

        def watch() -> None:
            while not over.wait(0.05):
                if ready():
                    node = self.workers.pop()
                    raylet = node.all_processes["raylet"][0].process.pid
                    tasks = children(raylet)  # which would live on for a while without it
                    for pid in (raylet, *tasks):
                        os.kill(pid, signal.SIGKILL)
                    killed.extend(tasks)
                    return self.cluster.remove_node(node, allow_graceful=False)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        assert killed

    def mend(self) -> None:
        while len(self.workers) < 2:
            self.workers.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE))


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")  # tasks import this folder
        made = Nodes()
        yield made
        made.cluster.shutdown()


@pytest.fixture
def two(nodes):
    nodes.mend()
    return nodes


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tok") / "student"))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(path):
    return path.read_text().split() if path.exists() else []


def test_ops_while_a_node_is_killed(two, tok, tmp_path):
    """Every trace leaves a line when it is worked on: a shard's worth at most has two."""
    source, log, rows = make_store(tmp_path / "source", some_traces(160), tok), tmp_path / "log", 8
    ops = (Slow(seconds=0.05, log=str(log)), StripThinking())
    job = OpsJob(store=source.url, out=str(tmp_path / "ray"), ops=ops, shard_rows=rows)
    with two.killing(lambda: len(lines(log)) >= 60):
        summary = ops_on_ray(job, RayCluster(address=two.address, parts=PARTS))
    done = Counter(lines(log))
    again = sum(done.values()) - len(done)
    print(f"{again} of {len(done)} traces twice, shards have {rows}")
    assert len(done) == 160 and again <= rows
    assert summary == run_ops(OpsJob(store=source.url, out=str(tmp_path / "one"), ops=ops, shard_rows=rows))
    assert files(tmp_path / "ray") == files(tmp_path / "one") and summary["kept"] == 160


def test_score_while_a_node_is_killed(two, tok, tmp_path):
    teacher, log = teacher_folder(tmp_path / "teacher", tok), tmp_path / "log"
    stores = {n: make_store(tmp_path / n, some_traces(250), tok) for n in ("one", "ray")}
    job = lambda n: ScoreJob(store=stores[n].url, teacher=str(teacher), signal="topk:3", batch_tokens=512)
    score(job("one"))
    work = partial(score_slowly, job("ray"), 0.7, str(log))
    with two.killing(lambda: len(lines(log)) >= 5):
        reports = run_parts(work, RayCluster(address=two.address, parts=PARTS), "score")
    assert sum(r["rows"] for r in reports) == 250 and len(stores["one"].shards) == 16
    assert join(TraceStore.open(stores["ray"].url), "topk3") == 250
    assert files(tmp_path / "ray") == files(tmp_path / "one")
    done = Counter(lines(log))
    print(f"{sum(done.values()) - len(done)} of {len(done)} shards twice")
    assert len(done) == 16 and sum(done.values()) <= 17, done


def call(*args):
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in args])
    return e.value.code


def test_the_three_commands(two, tok, tmp_path, capsys):
    teacher, tokenizer = teacher_folder(tmp_path / "teacher", tok), tiny_folder(tmp_path / "tok")
    traces = some_traces(24)
    answers = {t.question: t for t in traces}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": t.question, "gold": t.gold}) + "\n"
                                              for t in traces))
    with serving(lambda body: said(answers[body["messages"][-1]["content"]].answer)) as (url, seen):
        for name, more in (("one", ()), ("ray", ("--ray", two.address, "--parts", 3))):
            store = tmp_path / name
            assert call("generate", tmp_path / "q.jsonl", "--engine", url, "--tokenizer", tokenizer, "--out", store,
                        *more) == 0
            assert call("score", store, "--teacher", teacher, "--signal", "topk:3", *more) == 0
            assert call("ops", store, "--op", "keep_correct", "--tokenizer", tokenizer, "--out",
                        tmp_path / f"{name}-ops", *more) == 0
            assert "24 traces read, 24 written" in capsys.readouterr().err
    assert len(seen) == 48
    one, ray = (TraceStore.open(tmp_path / n) for n in ("one", "ray"))
    assert [r.trace.to_json() for r in one.rows()] == [r.trace.to_json() for r in ray.rows()]
    for mine, theirs in zip(one.signal("topk3").read(range(24)), ray.signal("topk3").read(range(24))):
        assert all((a == theirs.arrays()[k]).all() for k, a in mine.arrays().items())
    assert files(tmp_path / "one-ops") == files(tmp_path / "ray-ops")


def test_what_a_user_can_mend_is_one_line(two, tok, tmp_path, capsys):
    make_store(tmp_path / "s", some_traces(8), tok)
    assert call("score", tmp_path / "s", "--teacher", tmp_path / "none", "--ray", two.address, "--parts", 2) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: part ") and str(tmp_path / "none") in err
    ops = lambda op, address: call("ops", tmp_path / "s", "--op", op, "--out", tmp_path / "o", "--ray", address,
                                   "--parts", 2)
    assert ops("dedup", two.address) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot run in parts" in err
    assert ops("strip_thinking", "127.0.0.1:1") == 2
    assert "--ray 127.0.0.1:1: no cluster there" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
