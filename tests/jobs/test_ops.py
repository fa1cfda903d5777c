"""`distill_jax ops`: any number of parts, killed or not, makes the bytes of one process."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs import ops as job
from distill_jax.jobs import ray_parts
from distill_jax.jobs.ops import OpsJob, parse_op, run_ops, units_of
from distill_jax.jobs.parts import Part
from distill_jax.jobs.store_parts import join_rows
from distill_jax.traces.ops.dedup import Dedup
from distill_jax.traces.ops.drop_flags import DropFlags
from distill_jax.traces.ops.keep_correct import KeepCorrect
from distill_jax.traces.ops.max_length import MaxLength
from distill_jax.traces.ops.strip_thinking import StripThinking
from distill_jax.traces.store import Raced, TraceStore
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.some_ops import OnePerQuestion, Slow
from tests.s3 import s3_bucket

QUESTIONS, SAMPLES = 30, 3


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tok") / "student"))


@pytest.fixture(scope="module")
def source(tok, tmp_path_factory):
    """Three samples of each question, sample by sample: a question's rows lie far apart. The last sample repeats
    what the first says."""
    first, second = some_traces(QUESTIONS), some_traces(QUESTIONS, seed=1)
    again = [t.replace(segments=(a.segments[0], *t.segments[1:]), group=a.group) for a, t in zip(first, second)]
    return make_store(tmp_path_factory.mktemp("ops") / "source", [*first, *again, *first], tok)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def work(source, out, *ops, part=None, **kwargs):
    return run_ops(OpsJob(store=source.url, out=str(out), ops=ops, shard_rows=8, part=part, **kwargs))


@pytest.mark.parametrize("ops", [(KeepCorrect(unchecked=True), StripThinking()),
                                 (Dedup(scope="group"), OnePerQuestion())], ids=["rows", "questions"])
def test_same_bytes_as_one_process(source, tmp_path, ops):
    summary = work(source, tmp_path / "one", *ops)
    want = files(tmp_path / "one")
    assert len(TraceStore.open(tmp_path / "one").shards) > 2 and not any("parts" in k for k in want)
    for n in (2, 5):
        out = tmp_path / str(n)
        parts = [work(source, out, *ops, part=Part(index=i, count=n)) for i in reversed(range(n))]
        assert sum(p["kept"] for p in parts) == summary["kept"] and not (out / "manifest.json").exists()
        assert [join_rows(str(out)) for _ in range(2)] == [summary] * 2
        assert files(out) == want
        assert work(source, out, *ops, part=Part(index=1, count=n)) == summary  # nothing left to do
        assert files(out) == want
    TraceStore.open(tmp_path / "one").verify()


def test_what_the_ops_leave(source, tmp_path):
    summary = work(source, tmp_path / "s", KeepCorrect(), MaxLength(written=120), OnePerQuestion())
    traces = [t for t in source.traces() if t.verdict]
    fits = [t for t in traces if sum(len(s.text) for s in t.segments[1:]) <= 120]
    groups = dict.fromkeys(t.group for t in fits)
    assert summary["traces"] == len(source) and summary["kept"] == len(groups)
    assert summary["after"] == [len(traces), len(fits), len(groups)] and 0 < len(fits) < len(traces)
    left = list(TraceStore.open(tmp_path / "s").traces())
    assert [t.group for t in left] == list(groups) and {t.id for t in left} <= {t.id for t in fits}
    assert {t.provenance.ops for t in left} == {("keep_correct", "max_length(written=120)", "one_per_question")}
    draws = {tuple(t.id for t in TraceStore.open(tmp_path / str(seed)).traces())
             for seed in (0, 1) if work(source, tmp_path / str(seed), OnePerQuestion(), seed=seed)}
    assert len(draws) == 2


def test_the_corpus_in_one_process(source, tmp_path):
    assert work(source, tmp_path / "s", Dedup())["kept"] == 2 * QUESTIONS
    with pytest.raises(ValueError, match=r"dedup: looks at all traces .*scope: group"):
        work(source, tmp_path / "p", Dedup(), part=Part(index=0, count=2))
    assert not (tmp_path / "p").exists()
    questions = work(source, tmp_path / "q", Dedup(scope="group"))
    assert questions["kept"] == 2 * QUESTIONS
    ids = lambda name: sorted(t.id for t in TraceStore.open(tmp_path / name).traces())
    assert ids("s") == ids("q")  # an id holds the question


def test_units_are_whole_questions(source):
    units = units_of(source, (OnePerQuestion(),), 8)
    groups = source.index().groups
    assert sorted(i for u in units for i in u) == list(range(len(source))) and len(units) == QUESTIONS // 3
    assert sum(len({groups[i] for i in u}) for u in units) == QUESTIONS
    assert [len(u) for u in units_of(source, (StripThinking(),), 8)] == [8] * 11 + [2]


@pytest.mark.parametrize("dies_at", ["unit", "commit", "tally"])
def test_killed_part_does_one_unit_again(source, tmp_path, monkeypatch, dies_at):
    ops, part = (KeepCorrect(unchecked=True), OnePerQuestion()), Part(index=0, count=2)
    work(source, tmp_path / "whole", *ops)
    real, calls, alive = job._unit, [], [True]

    def counting(traces, job_, tok, number):
        calls.append(number)
        if dies_at == "unit" and len(calls) == 3 and alive.pop():
            raise KeyboardInterrupt
        return real(traces, job_, tok, number)

    monkeypatch.setattr(job, "_unit", counting)
    if dies_at != "unit":
        dying(monkeypatch, dies_at)
    with pytest.raises(KeyboardInterrupt):
        work(source, tmp_path / "s", *ops, part=part)
    with pytest.raises(ValueError, match=r"unfinished: 0/2 \(unfinished\), 1/2 \(not begun\)"):
        join_rows(str(tmp_path / "s"))
    monkeypatch.undo()
    monkeypatch.setattr(job, "_unit", counting)
    work(source, tmp_path / "s", *ops, part=part)
    units = len(part.cut(units_of(source, ops, 8)))
    assert sorted(calls) == sorted([*range(units), 2])  # one of them twice
    work(source, tmp_path / "s", *ops, part=Part(index=1, count=2))
    join_rows(str(tmp_path / "s"))
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def dying(monkeypatch, where):
    """The third commit fails before it is there, or the third tally."""
    owner, name = {"commit": (job.TraceStore, "writer"), "tally": (job.json, "dumps")}[where]
    real, calls = getattr(owner, name), []

    def dumps(value, **kwargs):
        if isinstance(value, dict) and "after" in value and "settings" not in value:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
        return real(value, **kwargs)

    def writer(self, *args):
        made = real(self, *args)
        commit = made.commit

        def dies():
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            commit()

        made.commit = dies
        return made

    monkeypatch.setattr(owner, name, {"commit": writer, "tally": dumps}[where])


def test_killed_join(source, tmp_path, monkeypatch):
    ops = (KeepCorrect(unchecked=True),)
    work(source, tmp_path / "whole", *ops)
    for i in range(3):
        work(source, tmp_path / "s", *ops, part=Part(index=i, count=3))
    real, calls = TraceStore.rows, []

    def rows(self, ids=None):
        for row in real(self, ids):
            calls.append(1)
            if len(calls) in (30, 45):
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(TraceStore, "rows", rows)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            join_rows(str(tmp_path / "s"))
    join_rows(str(tmp_path / "s"))
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_a_join_leaves_the_parts_of_signals(source, tmp_path):
    work(source, tmp_path / "s", KeepCorrect())
    scored = tmp_path / "s" / "parts" / "topk3" / "00000-of-00002" / "000000.npz"
    scored.parent.mkdir(parents=True)
    scored.write_bytes(b"a day's work")
    assert join_rows(str(tmp_path / "s"))["kept"] and scored.exists()


def test_two_processes_of_one_part(source, tmp_path, monkeypatch):
    """As on a lost node whose process still writes: equal shards are one shard."""
    slow = Slow(seconds=0.005, log=str(tmp_path / "log"))
    one, two = (OpsJob(store=source.url, out=str(tmp_path / n), ops=(slow,), shard_rows=8) for n in ("one", "two"))
    monkeypatch.chdir(tmp_path)
    task = ray_parts._Task(partial(ray_parts.part_of, run_ops, two, None), 1, str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(task, [{"id": [0]}] * 2))
    assert reports[0] == reports[1] and reports[0]["error"] == [""]
    assert 90 < len((tmp_path / "log").read_text().split()) <= 180
    run_ops(one)
    join_rows(two.out)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_task_begins_again_after_a_race(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_parts, "PAUSE", 0.0)
    monkeypatch.setattr(ray_parts, "RACES", 3)
    calls = []

    def work_(part):
        calls.append(part)
        if len(calls) < 3:
            raise Raced("shards/000002.json")
        return {"kept": 7}

    task = ray_parts._Task(work_, 4, str(tmp_path))
    assert task({"id": [2]}) == {"part": [2], "report": ['{"kept": 7}'], "error": [""]}
    assert calls == [Part(index=2, count=4)] * 3
    calls = []
    monkeypatch.setattr(ray_parts, "RACES", 1)
    assert task({"id": [2]})["error"] == ["shards/000002.json"]


def test_parts_without_a_row(source, tmp_path):
    """More parts than units, and Ops that leave some parts nothing."""
    shortest = min(sum(len(s.text) for s in t.segments) for t in source.traces())
    ops = (MaxLength(chars=shortest),)
    want = work(source, tmp_path / "one", *ops)
    kept = [work(source, tmp_path / "many", *ops, part=Part(index=i, count=20))["kept"] for i in range(20)]
    assert 0 in kept and sum(kept) == want["kept"]
    join_rows(str(tmp_path / "many"))
    assert files(tmp_path / "many") == files(tmp_path / "one")
    with pytest.raises(ValueError, match=r"no trace kept of 90 .*\[0\].*No store"):
        work(source, tmp_path / "none", MaxLength(chars=1))
    assert not files(tmp_path / "none")


def test_parts_that_do_not_belong_together(source, tok, tmp_path):
    out, keep = tmp_path / "s", KeepCorrect()
    work(source, out, keep, part=Part(index=0, count=2))
    for says, call in ((r"begun in 2 parts, this is part 1/3", {"part": Part(index=1, count=3)}),
                       (r"part 0/2 was begun with another ops.seed than part 1/2", {"part": Part(index=1, count=2),
                                                                                    "seed": 1})):
        with pytest.raises(ValueError, match=says):
            work(source, out, keep, **call)
    with pytest.raises(ValueError, match=r"another ops.ops than part 1/2"):
        work(source, out, DropFlags(), part=Part(index=1, count=2))
    other = make_store(tmp_path / "other", some_traces(20, seed=3), tok)
    with pytest.raises(ValueError, match=r"another ops.store than part 1/2"):
        work(other, out, keep, part=Part(index=1, count=2))
    work(source, tmp_path / "t", keep, part=Part(index=1, count=2), seed=1)  # moved together by hand
    (tmp_path / "t" / "parts" / "00001-of-00002").rename(out / "parts" / "00001-of-00002")
    with pytest.raises(ValueError, match=r"part 1/2 was begun with another ops.seed than part 0/2"):
        join_rows(str(out))
    with pytest.raises(ValueError, match=r"no parts to join"):
        join_rows(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"not made by ops"):
        work(source, tmp_path / "other", keep)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty .*thesis.txt"):
        work(source, tmp_path / "full", keep, part=Part(index=0, count=2))
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_ops_by_name():
    assert parse_op("dedup") == Dedup() and parse_op("dedup: {scope: group}") == Dedup(scope="group")
    assert parse_op("max_length: {chars: 40}") == MaxLength(chars=40)
    assert parse_op("tests.jobs.some_ops:OnePerQuestion") == OnePerQuestion()
    for text, says in [("dedupe", "known: dedup, drop_flags"), ("max_length", "needs a bound"),
                       ("max_length: {char: 4}", "did you mean chars"), ("[a]", "expected NAME"),
                       ("no.such:Op", "cannot import"), ("json:dumps", "known:"), ("a: {b", "not YAML"),
                       ("distill_jax.traces.trace:Segment", "known:")]:
        with pytest.raises(ValueError, match=says):
            parse_op(text)
    with pytest.raises(ValueError, match="at least one --op"):
        OpsJob(store="s", out="o", ops=())


@pytest.fixture
def bucket():
    """A client of a server of this test, with an empty bucket."""
    with s3_bucket("ops") as client:
        yield client


def test_parts_in_an_object_store(bucket, source, tmp_path):
    work(source, tmp_path / "one", StripThinking())
    for i in range(2):
        work(source, "s3://ops/short", StripThinking(), part=Part(index=i, count=2))
    assert join_rows("s3://ops/short")["kept"] == len(source)
    there = [o["Key"] for o in bucket.list_objects_v2(Bucket="ops")["Contents"]]
    found = {k.removeprefix("short/"): bucket.get_object(Bucket="ops", Key=k)["Body"].read() for k in there}
    assert found == files(tmp_path / "one")
