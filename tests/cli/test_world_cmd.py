import json

from pytest import raises

from distill_jax.cli.main import main
from distill_jax.traces.trace import Trace
from distill_jax.traces.world.generate import WorldSpec, trace


def run(*args: str) -> int:
    with raises(SystemExit) as e:
        main(["world", *args])
    return int(e.value.code or 0)


def test_writes_traces_once(tmp_path, capsys):
    out = tmp_path / "w.jsonl"
    args = ("--kind", "lookup", "--k", "4", "--n", "5", "--split", "eval", "--out", str(out))
    assert run(*args) == 0
    rows = [Trace.from_json(json.loads(line)) for line in out.read_text().splitlines()]
    assert rows == [trace(WorldSpec(kind="lookup", k=4, split="eval"), i) for i in range(5)]
    assert "different_questions" in capsys.readouterr().err
    before = out.read_bytes()
    assert run(*args) == 2 and out.read_bytes() == before
    assert "exists" in capsys.readouterr().err


def test_shows_and_builds_a_tokenizer(tmp_path, capsys):
    assert run("--show", "2", "--tokenizer", str(tmp_path / "tok")) == 0
    shown = capsys.readouterr().out
    assert shown.count("<think>") == 2 and "gold_position=" in shown
    assert (tmp_path / "tok" / "tokenizer.json").exists()


def test_bad_arguments(capsys):
    assert run() == 2 and "nothing to do" in capsys.readouterr().err
    assert run("--kind", "nope", "--show", "1") == 2 and "two_hop" in capsys.readouterr().err


def test_nothing_half_written_and_nothing_overwritten(tmp_path, capsys, monkeypatch):
    out, tok = tmp_path / "w.jsonl", tmp_path / "tok"

    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("distill_jax.jobs.world.json.dumps", full)
        assert run("--n", "3", "--out", str(out)) == 2
    assert "No space left on device; free some space" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert run("--tokenizer", str(tok)) == run("--tokenizer", str(tok)) == 0
    before = (tok / "tokenizer.json").read_bytes()
    assert run("--tokenizer", str(tok), "--rendering", "rich") == 2
    assert "holds another tokenizer" in capsys.readouterr().err and (tok / "tokenizer.json").read_bytes() == before
