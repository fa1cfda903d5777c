"""`distill-jax generate`: a model in memory, a command, a server; restarts; what is kept and what is not."""

import json

import pytest

from distill_jax.cli.main import main
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode import Sampling
from distill_jax.jobs import generate as job
from distill_jax.jobs.generate import Complaints, Keeping, ModelTeacher, generate_store
from distill_jax.jobs.parts import Part
from distill_jax.jobs.questions import QuestionSet
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.jobs.store_parts import join_rows
from distill_jax.jobs.write_store import write_store
from distill_jax.recipe import Generate, Recipe, Score
from distill_jax.rollout import generation
from distill_jax.traces.store import TraceStore
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.tokenizer import build_tokenizer
from tests.jobs.stub_server import said, serving
from tests.jobs.teachers import teacher_folder, tiny_model

ALL = Keeping(keep="all", shard_rows=4)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tok") / "compact"))


def teacher(tok, n=2, batch_size=4, max_new_tokens=6, **kwargs):
    model, params = tiny_model(tok.real)
    sampling = Sampling(temperature=1.0, max_new_tokens=max_new_tokens)
    return ModelTeacher(model, params, tok, sampling, n=n, batch_size=batch_size, name="tiny", **kwargs)


def questions(n=20):
    return list(traces(WorldSpec(kind="lookup", k=2), n))


def contents(path):
    store = TraceStore.open(str(path))
    return [(r.tokens.tolist(), r.roles.tolist(), t.to_json()) for r, t in
            zip(store.read(range(len(store))), store.traces())]


def test_store_of_a_model(tok, tmp_path):
    asked = questions()
    summary = generate_store(str(tmp_path / "s"), asked, teacher(tok), tok, ALL)
    distinct = len({t.group for t in asked})
    assert summary["rows_in"] == 20 and summary["questions"] == distinct
    assert summary["kept"] == 2 * distinct and summary["traces"] == 2 * distinct + 20 - distinct
    assert summary["traces"] == summary["kept"] + sum(summary["rejected"].values())
    store = TraceStore.open(str(tmp_path / "s"))
    made = list(store.traces())
    assert [t.group for t in made][::2] == list(dict.fromkeys(t.group for t in asked))
    assert summary["solved"] == len({t.group for t in made if t.verdict})
    assert summary["completion_tokens"] == sum(len(t.encoded.ids) - t.encoded.prompt_length for t in made)
    for row, t in zip(store.read(range(len(store))), made):
        assert row.tokens.tolist() == t.encoded.ids.tolist() and t.gold
        assert t.provenance.teacher == "tiny" and t.meta["kind"] == "lookup"
    assert store.header.extra["generate"]["sampling"]["temperature"] == 1.0
    assert sorted(p.name for p in (tmp_path / "s").iterdir() if p.suffix in (".json", ".jsonl")) == [
        "manifest.json", "rejects.jsonl", "summary.json"]
    assert not (tmp_path / "s" / "samples").exists()


def test_killed_and_started_again(tok, tmp_path, monkeypatch):
    """Killed while sampling, and once while writing: the same store, and no unit is sampled twice."""
    asked = questions()
    whole = generate_store(str(tmp_path / "whole"), asked, teacher(tok), tok, ALL)
    real, calls, appended = generation.Generator.complete, [], []

    def counting(self, requests, *args, **kwargs):
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, requests, *args, **kwargs)

    append = job.Output.append

    def dying(self, row, state):
        appended.append(1)
        if len(appended) == 14:
            raise KeyboardInterrupt
        append(self, row, state)

    monkeypatch.setattr(generation.Generator, "complete", counting)
    monkeypatch.setattr(job.Output, "append", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generate_store(str(tmp_path / "killed"), asked, teacher(tok), tok, ALL)
    assert generate_store(str(tmp_path / "killed"), asked, teacher(tok), tok, ALL) == whole
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    units = -(-whole["questions"] // teacher(tok).unit)
    assert len(calls) == units + 1  # one was interrupted
    assert generate_store(str(tmp_path / "killed"), asked, teacher(tok), tok, ALL) == whole  # finished: nothing asked
    assert len(calls) == units + 1
    with pytest.raises(ValueError, match=r"another generate \(seed: 0 there, 1 now"):
        generate_store(str(tmp_path / "killed"), asked, teacher(tok, seed=1), tok, ALL)


def test_nothing_kept_leaves_the_samples(tok, tmp_path, monkeypatch):
    """A tiny random model answers nothing right; asking again with another --keep does not sample again."""
    out, asked = str(tmp_path / "s"), questions(4)
    with pytest.raises(ValueError, match=r"no trace kept of 4 rows .*--keep all"):
        generate_store(out, asked, teacher(tok, n=1), tok, Keeping(keep="correct"))
    with pytest.raises(ValueError, match="samples made with another n"):
        generate_store(out, asked, teacher(tok, n=2), tok, ALL)
    monkeypatch.setattr(ModelTeacher, "__call__", lambda *a: pytest.fail("sampled again"))
    assert generate_store(out, asked, teacher(tok, n=1), tok, ALL)["kept"] == 4


def test_prompts_that_do_not_fit(tok, tmp_path):
    asked = [*questions(3), *traces(WorldSpec(kind="lookup", k=24), 2)]
    summary = generate_store(str(tmp_path / "s"), asked, teacher(tok, n=1, max_new_tokens=80), tok, ALL)
    assert summary["rejected"] == {"prompt_too_long": 2} and summary["kept"] == 3
    rejects = [json.loads(x) for x in (tmp_path / "s" / "rejects.jsonl").read_text().splitlines()]
    assert [r["row_number"] for r in rejects] == [3, 4] and "--max-new-tokens" in rejects[0]["detail"]


def test_stages_of_a_recipe(tok, tmp_path):
    """Questions of a store -> traces -> their signal; started again, nothing is done twice."""
    folder = str(teacher_folder(tmp_path / "teacher", tok))
    write_store(str(tmp_path / "questions"), questions(6), tok)
    recipe = Recipe(name="r", runs=str(tmp_path / "runs"), stages=(
        Generate(teacher=folder, questions=str(tmp_path / "questions"), keep="all", batch_size=4,
                 sampling=Sampling(temperature=1.0, max_new_tokens=6)),
        Score(store="stage:generate/store", teacher=folder, signal="topk:4", batch_tokens=256)))
    lines: list[str] = []
    assert run_recipe(recipe, lines.append) and run_recipe(recipe, lines.append)
    assert "6 traces kept" in "\n".join(lines) and lines[-1].startswith("[score] done")
    store = TraceStore.open(str(tmp_path / "runs" / "r" / "generate" / "store"))
    assert len(store) == len(store.signal("topk4")) == 6
    assert json.loads((tmp_path / "runs" / "r" / "generate" / "done.json").read_text())["result"]["kept"] == 6


def run(capsys, *args) -> tuple[int, str]:
    with pytest.raises(SystemExit) as e:
        main(["generate", *map(str, args)])
    return e.value.code, capsys.readouterr().err


def test_command(tok, tmp_path, capsys):
    folder = teacher_folder(tmp_path / "teacher", tok)
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": t.question, "gold": t.gold}) + "\n" for t in questions(5)))
    args = [file, "--teacher", folder, "--max-new-tokens", 6, "--batch-size", 4, "--keep", "all"]
    code, err = run(capsys, *args, "--out", tmp_path / "s")
    assert code == 0 and "5 questions asked" in err and "5 kept" in err and "truncated" in err
    assert "nothing to do" in run(capsys, *args, "--out", tmp_path / "s")[1]
    # a store is a source of questions, too
    code, err = run(capsys, tmp_path / "s", *args[1:], "--out", tmp_path / "again", "--n", 2, "--no-verify")
    assert code == 0 and "10 kept" in err
    for bad, says in ((("--keep", "some"), "expected one of"), (("--engine", "http://x"), "either --teacher"),
                      (("--n", 2, "--temperature", 0), "all be the same"), (("--top-p", 0), "top_p must be"),
                      (("--map", "question=nope"), "no question in 5 rows"), (("--max-questions", 0), "at least 1"),
                      (("--dtype", "int4"), "--dtype int4: expected auto"), (("--batch-size", 0), "--batch-size must")):
        code, err = run(capsys, *args, "--out", tmp_path / "bad", *bad)
        assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_parts_of_a_model(tok, tmp_path):
    """What a model samples does not depend on the questions beside it."""
    folder = teacher_folder(tmp_path / "teacher", tok)
    write_store(str(tmp_path / "questions"), questions(14), tok)
    make = lambda out, part=None: job.generate(job.GenerateJob(
        questions=QuestionSet(source=str(tmp_path / "questions")), out=str(tmp_path / out), teacher=str(folder), n=2,
        batch_size=4, sampling=Sampling(temperature=1.0, max_new_tokens=6), keeping=ALL, part=part))
    whole = make("one")
    for i in range(3):
        make("parts", Part(index=i, count=3))
    assert join_rows(str(tmp_path / "parts")) == whole
    assert [row[:2] for row in contents(tmp_path / "parts")] == [row[:2] for row in contents(tmp_path / "one")]


def test_command_with_a_server(tok, tmp_path, capsys):
    asked = questions(6)
    gold = {t.question: t for t in asked}

    def reply(body):
        t = gold[body["messages"][-1]["content"]]
        right = body["seed"] % 2
        return said(t.answer if right else "paris paris", reasoning_content=t.thinking, logprobs=[-0.5])

    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(t.to_json()) + "\n" for t in asked))
    build_tokenizer(tmp_path / "tok")
    with serving(reply, model="big") as (url, seen):
        code, err = run(capsys, file, "--engine", url, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "s",
                        "--n", 3, "--temperature", 0.8, "--keep", "correct", "--parallel", 2)
        assert code == 0 and len(seen) == 18
        assert "either" not in err
        assert run(capsys, file, "--engine", url, "--out", tmp_path / "x")[0] == 2
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    right = sum(b["seed"] % 2 for b in seen)
    assert summary["kept"] == right and summary["rejected"] == {"wrong_answer": 18 - right}
    assert summary["verdicts"] == {"right": right, "wrong": 18 - right}
    made = list(TraceStore.open(str(tmp_path / "s")).traces())
    assert all(t.verdict and t.encoded is None and t.thinking == gold[t.question].thinking for t in made)
    assert made[0].provenance.teacher == "big" and made[0].scores == {"mean_logprob": -0.5}


def test_a_server_in_trouble_is_said_now_and_then(capsys):
    complain = Complaints(every=60.0)
    for attempt in range(5):
        complain(f"http://x/v1/models: refused, attempt {attempt}")
    assert capsys.readouterr().err == "http://x/v1/models: refused, attempt 0; asking again\n"
