"""`--part` and `store join` on the command line: SLURM arrays, JobSet indices, kills, wrong calls."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distill_jax.cli.main import main
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.traces.store import TraceStore
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.stub_server import said, serving
from tests.jobs.teachers import teacher_folder

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS, PARTS = 40, 3


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tok") / "student"))


def run(capsys, *args) -> tuple[int, str]:
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in args])
    return int(e.value.code or 0), capsys.readouterr().err


def slurm(index: int, count: int) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in
            {"ID": index + 1, "MIN": 1, "MAX": count, "COUNT": count}.items()}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def contents(folder):
    return [(r.tokens.tolist(), r.text, r.trace.to_json()) for r in TraceStore.open(folder).rows()]


def test_score_as_a_slurm_array(tok, tmp_path, capsys, monkeypatch):
    teacher = teacher_folder(tmp_path / "teacher", tok)
    score = lambda store, *more: run(capsys, "score", tmp_path / store, "--teacher", teacher, "--signal", "topk:3",
                                     "--batch-tokens", 512, *more)
    for name in ("one", "parts"):
        make_store(tmp_path / name, some_traces(60), tok)
    assert score("one")[0] == 0
    for i in range(PARTS):
        with monkeypatch.context() as m:
            for k, v in slurm(i, PARTS).items():
                m.setenv(k, v)
            code, err = score("parts", "--part", "auto")
        assert code == 0 and f"part {i}/3 of signal topk3 is whole" in err and "store join STORE topk3" in err
        code, err = run(capsys, "store", "join", tmp_path / "parts", "topk3")
        assert code == (0 if i == PARTS - 1 else 2)
        assert "topk3: 60 rows" in err if code == 0 else f"unfinished: {i + 1}/3 (0 of" in err
    signal_of = lambda name: files(tmp_path / name / "signals")
    assert signal_of("parts") == signal_of("one") and files(tmp_path / "parts") == files(tmp_path / "one")


def test_ops_with_job_indices(tok, tmp_path, capsys, monkeypatch):
    make_store(tmp_path / "source", some_traces(60), tok)
    ops = lambda out, *more: run(capsys, "ops", tmp_path / "source", "--op", "keep_correct: {unchecked: true}", "--op",
                                 "strip_thinking", "--shard-rows", 8, "--out", tmp_path / out, *more)
    code, err = ops("one")
    assert code == 0 and "60 traces read, 40 written" in err and "40 after KeepCorrect(unchecked=True)" in err
    for i in (2, 0, 1):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(i))
        assert ops("parts", "--part", "auto/3")[0] == 0
    code, err = run(capsys, "store", "join", tmp_path / "parts")
    assert code == 0 and "40 rows" in err and files(tmp_path / "parts") == files(tmp_path / "one")


@pytest.fixture
def answer(tmp_path):
    """What a server says to the questions in q.jsonl: a function of the request."""
    traces = some_traces(QUESTIONS)
    (tmp_path / "q.jsonl").write_text("".join(
        json.dumps({"question": t.question, "gold": t.gold}) + "\n" for t in [*traces, traces[0]]))
    answers = {t.question: t for t in traces}

    def reply(body):
        t = answers[body["messages"][-1]["content"]]
        return said(t.answer if body["seed"] % 3 else "The answer is nothing.",
                    reasoning_content=f"{t.thinking} {body['seed']}")

    return reply


def generating(tmp_path, url, out, *more):
    return ["generate", tmp_path / "q.jsonl", "--engine", url, "--tokenizer", tmp_path / "tok", "--out",
            tmp_path / out, "--n", 2, "--parallel", 1, "--keep", "correct", *more]


def test_generate_in_parts(tok, tmp_path, capsys, answer):
    tiny_folder(tmp_path / "tok")
    with serving(answer) as (url, seen):
        call = lambda *args: run(capsys, *generating(tmp_path, url, *args))
        assert call("one")[0] == 0 and len(seen) == 2 * QUESTIONS
        for i in range(PARTS):
            assert call("parts", "--part", f"{i}/{PARTS}")[0] == 0
        assert len(seen) == 4 * QUESTIONS
        assert "nothing to do" in call("parts", "--part", f"0/{PARTS}")[1]
        code, err = call("parts")
        assert code == 2 and "holds 3 of 3 parts of a generate" in err and "store join" in err
        assert run(capsys, "store", "join", tmp_path / "parts")[0] == 0
        assert "nothing to do" in call("parts", "--part", f"1/{PARTS}")[1] and "nothing to do" in call("parts")[1]
        assert len(seen) == 4 * QUESTIONS
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "parts")]
    assert summaries[0] == summaries[1] and summaries[0]["rejected"]["duplicate_question"] == 1
    assert 0 < summaries[0]["kept"] < 2 * QUESTIONS and not (tmp_path / "parts" / "parts").exists()
    assert (tmp_path / "one" / "rejects.jsonl").read_bytes() == (tmp_path / "parts" / "rejects.jsonl").read_bytes()
    TraceStore.open(tmp_path / "parts").verify()


def test_a_part_that_keeps_nothing(tok, tmp_path, capsys, answer):
    """The first third is answered wrong; then everything."""
    tiny_folder(tmp_path / "tok")
    wrong = {t.question for t in some_traces(QUESTIONS)[:14]}
    reply = lambda body: said("Nothing.") if body["messages"][-1]["content"] in wrong else answer(body)
    with serving(reply) as (url, _):
        call = lambda *args: run(capsys, *generating(tmp_path, url, *args))
        assert call("one")[0] == 0
        said_of = [call("parts", "--part", f"{i}/{PARTS}") for i in range(PARTS)]
        assert [code for code, _ in said_of] == [0] * 3 and ", 0 kept" in said_of[0][1]
        assert run(capsys, "store", "join", tmp_path / "parts")[0] == 0
        assert contents(tmp_path / "parts") == contents(tmp_path / "one")
        wrong |= {t.question for t in some_traces(QUESTIONS)}
        for i in range(PARTS):
            assert call("none", "--part", f"{i}/{PARTS}")[0] == 0
        code, err = run(capsys, "store", "join", tmp_path / "none")
        assert code == 2 and "no trace kept of 81" in err and "no_answer_found" in err and not files(tmp_path / "none")


def test_a_killed_part_of_generate(tok, tmp_path, capsys, answer):
    """SIGKILL in its second unit (8 questions here): what was answered before is not asked again."""
    tiny_folder(tmp_path / "tok")
    reached, answered = threading.Event(), threading.Semaphore(21)  # of 40: the second unit is in the making
    killed: list[bool] = []

    def stalling(body):
        if not answered.acquire(blocking=False) and not killed:
            reached.set()
            threading.Event().wait(60)
        return answer(body)

    with serving(stalling) as (url, seen):
        part = [str(a) for a in generating(tmp_path, url, "parts", "--part", "0/2")]
        process = subprocess.Popen([sys.executable, "-m", "distill_jax", *part], cwd=ROOT, stderr=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert reached.wait(120), process.communicate(timeout=10)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.append(True)
        before = len(seen)
        assert before == 22  # a unit of 16 samples, and six of the next one
        code, err = run(capsys, "store", "join", tmp_path / "parts")
        assert code == 2 and "missing or unfinished: 0/2 (unfinished), 1/2 (not begun)" in err
        assert run(capsys, *part)[0] == 0
        assert len(seen) - before == QUESTIONS - 16
        assert run(capsys, *generating(tmp_path, url, "parts", "--part", "1/2"))[0] == 0
        assert run(capsys, *generating(tmp_path, url, "one"))[0] == 0
    assert run(capsys, "store", "join", tmp_path / "parts")[0] == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


@pytest.mark.parametrize("args,says", [
    (("--part", "5/4"), "part 5/4: expected I/N with I from 0 to N - 1"), (("--part", "x"), "expected I/N as 3/16"),
    (("--part", "auto"), "neither SLURM_ARRAY_TASK_ID nor"), (("--parts", "4"), "--part I/N"),
    (("--ray", "local"), "say with --parts N"),
    (("--ray", "local", "--parts", "2", "--part", "0/2"), "one or the other"),
    (("--ray", "local", "--parts", "2", "--ray-needs", "2gpus"), "expected amounts as cpu=4,gpu=1"),
])
def test_wrong_calls(tmp_path, capsys, monkeypatch, args, says):
    for k in (*slurm(0, 1), "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(k, raising=False)
    out = ("--out", tmp_path / "out")
    for command in (("score", tmp_path / "s", "--teacher", "t"), ("generate", tmp_path / "q", "--teacher", "t", *out),
                    ("ops", tmp_path / "s", "--op", "strip_thinking", *out)):
        code, err = run(capsys, *command, *args)
        assert code == 2 and says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_parts_of_other_settings(tok, tmp_path, capsys):
    make_store(tmp_path / "source", some_traces(20), tok)
    ops = lambda *more: run(capsys, "ops", tmp_path / "source", "--op", "strip_thinking", "--out", tmp_path / "s",
                            *more)
    assert ops("--part", "0/2")[0] == 0
    for more, says in ((("--part", "1/2", "--seed", 1), "begun with another ops.seed"),
                       (("--part", "1/4"), "begun in 2 parts, this is part 1/4"), ((), "begun in 2 parts")):
        code, err = ops(*more)
        assert code == 2 and says in err and err.count("\n") == 1
    code, err = run(capsys, "store", "join", tmp_path / "source")
    assert code == 2 and "no parts to join" in err
    code, err = run(capsys, "store", "join", tmp_path / "source", "topk3")
    assert code == 2 and "no parts of a signal 'topk3'" in err


def test_ray_is_asked_for_where_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, err = run(capsys, "score", tmp_path / "s", "--teacher", "t", "--ray", "local", "--parts", 2)
    assert code == 2 and "pip install 'distill_jax[ray]'" in err and err.count("\n") == 1
