"""`distill-jax score`: stored tokens, other templates, restarts, and pairs that do not fit."""

import dataclasses
import json

import numpy as np
import pytest

from distill_jax.cli.main import main
from distill_jax.core.batch import FOREIGN
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.render import render
from distill_jax.data.source_specs import Store
from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs import score as job
from distill_jax.jobs.devices import parse_mesh
from distill_jax.jobs.score import ScoreJob, fingerprint, score_store
from distill_jax.rollout.scoring import SignalSpec, score_rows
from distill_jax.traces.store import TraceStore
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import teacher_folder, tiny_model

WRITTEN = [int(r) for r in SUPERVISED]
OPTIONS = {"signal": "topk:5", "batch_tokens": 512, "precision": "f32"}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tok") / "student"))


@pytest.fixture(scope="module")
def r1_tok(tmp_path_factory):
    """The same learned vocabulary; other added tokens, another template."""
    template = "[{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ 'teacher: ' }}{% endif %}"
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tok") / "teacher", think=False, end="<|stop|>",
                                      template=template))


def test_stored_tokens(tok, tmp_path):
    store = make_store(tmp_path / "s", some_traces(20), tok)
    model, params = tiny_model(tok.real)
    report = score_store(store, model, params, tok, ScoreJob(store="", teacher="t", **OPTIONS))
    reader = TraceStore.open(str(tmp_path / "s")).signal("topk5")
    rows, ids = store.read(range(20)), range(20)
    want = score_rows(model, params, rows, SignalSpec.parse("topk:5"), batch_tokens=999)
    for row, got, exact in zip(rows, reader.read(ids), want):
        assert (got.mask == np.isin(row.roles, WRITTEN)).all() and not got.mask[0]
        assert (got.ids == exact.ids).all() and got.ids.max() < tok.real
        np.testing.assert_allclose(got.logprobs[got.mask], exact.logprobs[got.mask], atol=1e-5)
        np.testing.assert_allclose(got.tail, exact.tail, atol=1e-5)
    assert report["signal"] == "topk5" and report["attached"] == "tokens" and report["coverage"] == 1
    assert report["rows"] == 20 and report["tokens"] == sum(int(r.mask.sum()) for r in want)
    mass = np.concatenate([1 - r.tail[r.mask] for r in want])
    assert report["mass"] == pytest.approx(mass.mean(), abs=1e-5)
    assert 0 < report["entropy"] < np.log(tok.real) and report["tokens_per_second"] > 0
    assert reader.header.teacher["fingerprint"] == fingerprint(params) != fingerprint(tiny_model(tok.real, seed=1)[1])


def test_killed_and_started_again(tok, tmp_path, monkeypatch):
    """A scoring that dies between shards, and once within one, leaves the same bytes and the same report."""
    model, params = tiny_model(tok.real)
    options = ScoreJob(store="", teacher="t", signal="topk:3", batch_tokens=512)
    whole = make_store(tmp_path / "whole", some_traces(40), tok)
    expected = score_store(whole, model, params, tok, options)
    store = make_store(tmp_path / "killed", some_traces(40), tok)
    real, calls = job._score_shard, []

    def dying(*args):
        calls.append(1)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(job, "_score_shard", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            score_store(store, model, params, tok, options)
    report = score_store(store, model, params, tok, options)
    timing = ("tokens_read", "seconds", "tokens_per_second")
    assert {k: v for k, v in report.items() if k not in timing} == {
        k: v for k, v in expected.items() if k not in timing}
    assert 0 < report["tokens_read"] < expected["tokens_read"]
    a, b = (TraceStore.open(str(tmp_path / n)).signal("topk3") for n in ("whole", "killed"))
    for x, y in zip(a.read(range(40)), b.read(range(40))):
        assert all(getattr(x, f).tobytes() == getattr(y, f).tobytes() for f in ("ids", "logprobs", "mask", "tail"))
    again = score_store(store, model, params, tok, options)
    assert again["tokens_read"] == 0 and again["tokens"] == expected["tokens"]
    with pytest.raises(ValueError, match="another header"):
        score_store(store, *tiny_model(tok.real, seed=1), tok, options)


@pytest.mark.parametrize("signal", ["topk:5", "token"])
def test_teacher_with_another_template(tok, r1_tok, tmp_path, signal):
    """The teacher reads its own rendering; what it says of a token stands at the student's token of the same bytes."""
    store = make_store(tmp_path / "s", some_traces(12), tok)
    model, params = tiny_model(r1_tok.real)
    options = ScoreJob(store="", teacher="t", signal=signal, batch_tokens=512, precision="f32", name="x")
    report = score_store(store, model, params, r1_tok, options)
    assert report["attached"] == "offsets" and 0.9 < report["coverage"] <= 1
    end = r1_tok.eos_ids[0]
    for number, got in enumerate(TraceStore.open(str(tmp_path / "s")).signal("x").read(range(12))):
        target = store.row(number)
        source = render(target.trace, r1_tok)
        exact = score_rows(model, params, [source], SignalSpec.parse(signal))[0]
        place = {(int(p), *s): t for t, (p, s) in enumerate(zip(source.parts, source.spans.tolist())) if p >= 0}
        hit = 0
        for t in np.flatnonzero(got.mask):
            if target.parts[t] < 0:
                continue
            at = place[(int(target.parts[t]), *target.spans[t].tolist())]
            assert source.tokens[at] == target.tokens[t]
            hit += 1
            if signal == "token":
                np.testing.assert_allclose(got.logprobs[t], exact.logprobs[at], atol=1e-4)
                continue
            kept = [(tok.eos_ids[0] if i == end else i, p) for i, p in zip(exact.ids[at], exact.logprobs[at])
                    if i == end or i < 400]
            assert [i for i in got.ids[t] if i >= 0] == [i for i, _ in kept]
            np.testing.assert_allclose(got.logprobs[t][got.ids[t] >= 0], [p for _, p in kept], atol=1e-4)
            np.testing.assert_allclose(got.tail[t], 1 - np.exp([p for _, p in kept]).sum(), atol=1e-4)
        assert hit > 0.9 * (np.isin(target.roles, WRITTEN) & (target.parts >= 0)).sum()


@pytest.mark.parametrize(("signal", "across"), [("topk:5", "match"), ("topk:5", "prefix"), ("token", "match")])
def test_teacher_with_another_vocabulary(tok, tmp_path, signal, across):
    """A distribution stands where both begin a token at the same byte, a log-prob where both have the same token;
    outcomes are looked up by their bytes, and no mass is made or lost."""
    student = load_tokenizer(tiny_folder(tmp_path / "student", vocabulary=330, think=False, end="<|stop|>"))
    store = make_store(tmp_path / "s", some_traces(6), student)
    model, params = tiny_model(tok.real)
    options = ScoreJob(store="", teacher="t", **OPTIONS | {"signal": signal}, name="x", across=across)
    report = score_store(store, model, params, tok, options)
    assert report["attached"] == f"groups/{across}"
    assert report["coverage"] == 1 and 0.5 < report["with_distribution"] < 1
    table = {student.token_bytes(i): i for i in range(student.real)} | {b"<|im_end|>": student.eos_ids[0]}
    foreign = 0
    targets = [store.row(i) for i in range(6)]
    sources = [render(t.trace, tok) for t in targets]
    scored = score_rows(model, params, sources, SignalSpec.parse(signal), batch_tokens=512)
    signals = TraceStore.open(str(tmp_path / "s")).signal("x").read(range(6))
    for got, target, source, exact in zip(signals, targets, sources, scored):
        place = {(int(p), s): t for t, (p, s) in enumerate(zip(source.parts, source.spans[:, 0].tolist())) if p >= 0}
        for t in np.flatnonzero((target.parts >= 0) & np.isin(target.roles, WRITTEN)):
            at = place.get((int(target.parts[t]), int(target.spans[t, 0])))
            same = at is not None and source.spans[at, 1] == target.spans[t, 1]
            assert got.mask[t] == (same if signal == "token" else at is not None)
            if not got.mask[t]:
                continue
            if signal == "token":
                np.testing.assert_allclose(got.logprobs[t], exact.logprobs[at], atol=1e-4)
                continue
            want = {}
            for i, p in zip(exact.ids[at].tolist(), np.exp(exact.logprobs[at])):
                raw = tok.token_bytes(i)
                ends = [len(raw)] if across == "match" or i >= 400 else range(len(raw), 0, -1)
                key = next((table[raw[:n]] for n in ends if raw[:n] in table), FOREIGN + i)
                want[key], foreign = want.get(key, 0) + p, foreign + (key >= FOREIGN)
            assert dict(zip(got.ids[t].tolist(), np.exp(got.logprobs[t]))) | {-1: 0} == pytest.approx(
                want | {-1: 0}, abs=1e-5)
            assert np.exp(got.logprobs[t]).sum() + got.tail[t] == pytest.approx(1, abs=1e-5)
        assert got.mask[-1], "the end of the turn, by its meaning"
    if signal != "token" and across == "match":
        assert foreign > 0
        spec = Store(path=str(tmp_path / "s"), signals=("x",), rows=2, seq_len=96)
        assert (open_source(spec, student, seed=0).batch(0).signals["x"].ids >= FOREIGN).any(), "they reach the losses"


def test_pairs_that_do_not_fit(tok, r1_tok, tmp_path):
    store = make_store(tmp_path / "s", some_traces(4), tok)
    options = ScoreJob(store="", teacher="t", **OPTIONS)
    folder = tiny_folder(tmp_path / "other", vocabulary=300)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "3"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    other = load_tokenizer(folder)
    with pytest.raises(ValueError, match=r"row \d: of its .*changes the text.*train on the text alone"):
        score_store(store, *tiny_model(other.real), other, options)
    wrong = dataclasses.replace(options, student_tokenizer=str(folder))
    with pytest.raises(ValueError, match=r"did not make this store.*as --student-tokenizer"):
        score_store(store, *tiny_model(other.real), other, wrong)
    with pytest.raises(ValueError, match=r"cannot be loaded here.*Give --student-tokenizer"):
        score_store(store, *tiny_model(other.real), other, dataclasses.replace(wrong, student_tokenizer="/nowhere"))
    with pytest.raises(ValueError, match="match or prefix"):
        dataclasses.replace(options, across="both")
    with pytest.raises(ValueError, match="4 of 4 rows are longer than the teacher's context of 8"):
        score_store(store, *tiny_model(tok.real, context=8), tok, options)
    assert store.signals() == []  # nothing was begun
    with pytest.raises(ValueError, match="no rows"):
        score_store(make_store(tmp_path / "empty", [], tok), *tiny_model(tok.real), tok, options)


def test_rows_beyond_the_context_are_counted(tok, r1_tok, tmp_path):
    store = make_store(tmp_path / "s", some_traces(20), tok)
    lengths = store.lengths()
    context = int(np.median(lengths))
    model, params = tiny_model(tok.real, context=context)
    options = ScoreJob(store="", teacher="t", skip_long=True, signal="token", batch_tokens=512)
    report = score_store(store, model, params, tok, options)
    assert report["rows_without_signal"] == {"longer_than_context": int((lengths > context).sum())}
    signals = TraceStore.open(str(tmp_path / "s")).signal("token").read(range(20))
    assert [s.mask.any() for s in signals] == (lengths <= context).tolist()


def test_command(tok, tmp_path, capsys):
    make_store(tmp_path / "s", some_traces(5), tok)
    teacher = teacher_folder(tmp_path / "teacher", tok)
    args = ["score", str(tmp_path / "s"), "--teacher", str(teacher), "--signal", "topk:4", "--batch-tokens", "512"]
    for text in ("tokens/s", "nothing to do"):
        with pytest.raises(SystemExit) as e:
            main(args)
        assert e.value.code == 0
        err = capsys.readouterr().err
        assert "signal topk4 (topk:4): 5 rows" in err and "entropy" in err and "retained mass" in err and text in err
    with pytest.raises(SystemExit):
        main([*args, "--name", "again", "--json", "--mesh", "data=8"])
    report = json.loads(capsys.readouterr().out)
    assert report["signal"] == "again" and set(report["by_role"]) == {"think", "answer"}
    for bad, says in (("--signal=kl", "expected topk:K"), ("--mesh=x=2", "expected axis=size"),
                      ("--dtype=int8", "expected auto"), ("--on=x", "unknown role"),
                      (f"--tokenizer={tmp_path}/none", "no tokenizer")):
        with pytest.raises(SystemExit) as e:
            main([*args, "--name", "bad", bad])
        assert e.value.code == 2 and says in capsys.readouterr().err
    assert TraceStore.open(str(tmp_path / "s")).signals() == ["again", "topk4"]


def test_parse_mesh():
    assert parse_mesh("") is None
    assert dict(parse_mesh("data=2, fsdp=-1").shape) == {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    with pytest.raises(ValueError, match="needs 3 devices"):
        parse_mesh("tensor=3")
