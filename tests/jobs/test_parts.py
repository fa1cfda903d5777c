"""Static partitions of `distill-jax score`: any number of parts, killed or not, makes the bytes of one process."""

import pytest

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs import score as job
from distill_jax.jobs.parts import Part, PartFolder, join
from distill_jax.jobs.score import ScoreJob, score_store
from distill_jax.traces.store import TraceStore
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import tiny_model

ROWS = 72


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tok") / "student"))


def put(path, tok, seed=0):
    store = make_store(path, some_traces(ROWS, seed), tok)
    assert len(store.shards) > 3
    return store


def run(store, tok, part=None, signal="topk:3", seed=0):
    options = ScoreJob(store="", teacher="t", signal=signal, batch_tokens=512, name="x", part=part)
    return score_store(store, *tiny_model(tok.real, seed=seed), tok, options)


def files(folder):
    """Every file of the signal and its bytes."""
    root = folder / "signals" / "x"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("signal", "counts"), [("topk:3", (3,)), ("hidden", (2,)), ("sampled:4", (2,))])
def test_same_bytes_as_one_process(tok, tmp_path, signal, counts):
    run(put(tmp_path / "one", tok), tok, signal=signal)
    want = files(tmp_path / "one")
    assert any("tallies" in k for k in want)
    for n in counts:
        store = put(tmp_path / str(n), tok)
        rows = [run(store, tok, Part(index=i, count=n), signal)["rows"] for i in reversed(range(n))]
        assert sum(rows) == ROWS and not store.signals()
        for _ in range(2):
            assert join(TraceStore.open(str(tmp_path / str(n))), "x") == ROWS
        again = run(store, tok, Part(index=0, count=n), signal)
        assert again["shards_scored_now"] == 0 and not list((tmp_path / str(n)).glob("parts/x/*"))
        assert files(tmp_path / str(n)) == want and not list(tmp_path.rglob("*.npz"))
        store.verify()


def test_killed_part_loses_one_shard(tok, tmp_path, monkeypatch):
    run(put(tmp_path / "one", tok), tok)
    store = put(tmp_path / "two", tok)
    real, calls = job._score_shard, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(job, "_score_shard", dying)
    parts = [Part(index=i, count=2) for i in range(2)]
    with pytest.raises(KeyboardInterrupt):
        run(store, tok, parts[0])
    mine = len(parts[0].of(store.shards))
    with pytest.raises(ValueError, match=rf"unfinished: 0/2 \(1 of {mine} shards\), 1/2 \(0 of"):
        join(store, "x")
    assert run(store, tok, parts[0])["shards_scored_now"] == mine - 1
    assert run(store, tok, parts[0])["shards_scored_now"] == 0
    run(store, tok, parts[1])
    join(store, "x")
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_parts_that_do_not_belong_together(tok, tmp_path):
    store = put(tmp_path / "s", tok)
    run(store, tok, Part(index=0, count=2))
    with pytest.raises(ValueError, match=r"begun in 2 parts, this is part 1/3"):
        run(store, tok, Part(index=1, count=3))
    with pytest.raises(ValueError, match=r"part 0/2 .* another header"):
        run(store, tok, Part(index=1, count=2), seed=1)
    (tmp_path / "t").mkdir()
    other = put(tmp_path / "t" / "s", tok, seed=1)
    (tmp_path / "s" / "parts").rename(tmp_path / "t" / "s" / "parts")
    with pytest.raises(ValueError, match=r"part 0/2 .* another store"):
        run(other, tok, Part(index=1, count=2))
    with pytest.raises(ValueError, match=r"no parts of a signal 'y'"):
        join(other, "y")


def test_damaged_part(tok, tmp_path):
    store = put(tmp_path / "s", tok)
    run(store, tok, part := Part(index=0, count=1))
    path = tmp_path / "s" / "parts" / "x" / part.folder / "000001.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"000001.npz of part 0/1 is damaged"):
        join(store, "x")
    path.unlink()
    assert run(store, tok, part)["shards_scored_now"] == 1 and join(store, "x") == ROWS
    assert PartFolder(store, "x", part).done() == set()


def test_parse():
    slurm = {f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "5", "MIN": "4", "MAX": "7", "COUNT": "4"}.items()}
    assert Part.parse("3/16") == Part(index=3, count=16) and Part.parse("") is None
    assert Part.parse("auto", slurm) == Part(index=1, count=4)
    assert Part.parse("auto/8", {"JOB_COMPLETION_INDEX": "7"}) == Part(index=7, count=8)
    for text, env, says in [("4/4", {}, "0 to N - 1"), ("-1/4", {}, "0 to N - 1"), ("a/4", {}, "expected I/N"),
                            ("3", {}, "expected I/N"), ("auto", {}, "neither SLURM"), ("auto/8", slurm, "has 4 tasks"),
                            ("auto", {"JOB_COMPLETION_INDEX": "7"}, "auto/N"),
                            ("auto", {**slurm, "SLURM_ARRAY_TASK_MAX": "10"}, "without gaps")]:
        with pytest.raises(ValueError, match=says):
            Part.parse(text, env)
