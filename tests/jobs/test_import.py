import gzip
import json
import os
import sys

import pytest

from distill_jax.cli.main import main
from distill_jax.jobs.import_rows import Inputs
from distill_jax.jobs.import_traces import ImportJob, import_traces
from distill_jax.traces.store import TraceStore
from tests.data.conftest import tiny_folder

HANGS = "\\boxed{9^{9^{9^{9^{9}}}}}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("tok") / "tiny"))


def write(path, rows) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(path)


def sample(i: int, right: bool = True) -> dict:
    return {"question": f"What is {i}+{i}?", "ground_truth": str(2 * i),
            "response": f"<think>\nhm {i}\n</think>\n\nThe answer is {2 * i if right else 7 * i + 1}."}


ROWS = [sample(1), sample(2, right=False), '{"question": ', sample(3),
        {**sample(4), "response": "<think>\nno end"}, {**sample(5), "response": ""},
        {**sample(6), "ground_truth": None}, {**sample(7), "response": "<think>\nx\n</think>\n\n\ud800"}]


def run(tmp_path, tokenizer, rows=ROWS, out="out", **inputs):
    file = write(tmp_path / "in.jsonl", rows)
    job = ImportJob(inputs=Inputs(files=(file,), **inputs), tokenizer=tokenizer, out=str(tmp_path / out), workers=1,
                    timeout=1.0)
    return import_traces(job)


def test_counts_add_up_and_the_store_holds_what_was_kept(tmp_path, tokenizer):
    summary = run(tmp_path, tokenizer)
    assert (summary["rows_in"], summary["traces"], summary["kept"], summary["rows_without_trace"]) == (8, 8, 3, 3)
    assert summary["rejected"] == {"bad_json": 1, "empty_response": 1, "not_unicode": 1, "unterminated_think": 1,
                                   "wrong_answer": 1}
    assert summary["traces"] == summary["kept"] + sum(summary["rejected"].values())
    assert summary["verdicts"] == {"right": 2, "unchecked": 1, "wrong": 2} and summary["timeouts"] == 0
    assert summary["flags"] == {"empty_answer": 1, "unterminated_think": 1}
    store = TraceStore.open(tmp_path / "out")
    kept = list(store.traces())
    assert [t.question for t in kept] == ["What is 1+1?", "What is 3+3?", "What is 6+6?"] and store.complete
    assert [t.verdict for t in kept] == [True, True, None] and kept[0].thinking == "hm 1"
    assert summary["tokens"] == sum(summary["by_role_tokens"].values()) == int(store.lengths().sum())
    assert summary["by_role_tokens"]["think"] > 0
    rejects = [json.loads(x) for x in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(r["reason"], r["row_number"]) for r in rejects] == [
        ("wrong_answer", 1), ("bad_json", 2), ("unterminated_think", 4), ("empty_response", 5), ("not_unicode", 7)]
    assert rejects[0]["row"] == ROWS[1] and "found '15', gold '4'" in rejects[0]["detail"]
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary


@pytest.mark.parametrize("inputs,kept", [
    ({"keep": "all"}, 5), ({"keep": "correct"}, 2), ({"verify": False, "keep": "correct"}, None), ({"max_rows": 2}, 1)])
def test_what_is_kept(tmp_path, tokenizer, inputs, kept):
    if kept is None:
        with pytest.raises(ValueError, match=r"no trace kept of 8 rows .*not_checked"):
            run(tmp_path, tokenizer, **inputs)
    else:
        assert run(tmp_path, tokenizer, **inputs)["kept"] == kept


def test_several_samples_a_row(tmp_path, tokenizer):
    rows = [{"question": f"q{i}", "gt": "1", "code": ["\\boxed{1}", "\\boxed{2}", ""]} for i in range(3)]
    summary = run(tmp_path, tokenizer, rows)
    assert (summary["rows_in"], summary["traces"], summary["kept"]) == (3, 9, 3)
    assert summary["rejected"] == {"empty_response": 3, "wrong_answer": 3} and summary["rows_without_trace"] == 0


def test_time_outs_are_counted_and_kept_apart(tmp_path, tokenizer):
    rows = [sample(1), {"question": "q", "ground_truth": "9", "response": HANGS}]
    summary = run(tmp_path, tokenizer, rows, keep="correct")
    assert summary["timeouts"] == 1 and summary["verdicts"] == {"right": 1, "unchecked": 1}
    assert summary["kept"] == 1 and summary["rejected"] == {"check_timed_out": 1}


def test_again_and_from_something_else(tmp_path, tokenizer, capsys):
    first = run(tmp_path, tokenizer)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert run(tmp_path, tokenizer) == first and "already: 3 traces; nothing to do" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"another import \(files: in.jsonl"):
        run(tmp_path, tokenizer, ROWS[:4])
    with pytest.raises(ValueError, match="keep: not-wrong there, all now"):
        run(tmp_path, tokenizer, keep="all")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == stamps


def test_a_trace_that_cannot_be_rendered_is_rejected(tmp_path, tokenizer, monkeypatch):
    import distill_jax.jobs.import_traces as module

    real = module.render

    def picky(trace, tok):
        if "3+3" in trace.question:
            raise ValueError("no tools here")
        return real(trace, tok)

    monkeypatch.setattr(module, "render", picky)
    summary = run(tmp_path, tokenizer)
    assert summary["kept"] == 2 and summary["rejected"]["cannot_render"] == 1
    (tmp_path / "out/summary.json").unlink()  # a kill before the end: the second run renders nothing again
    monkeypatch.setattr(module, "render", None)
    assert run(tmp_path, tokenizer) == summary


def command(*args):
    with pytest.raises(SystemExit) as e:
        main(["import", *map(str, args)])
    return e.value.code or 0


def test_command_line(tmp_path, tokenizer, capsys):
    file = write(tmp_path / "in.jsonl", [{"p": {"text": "q"}, "response": "a"}])
    out = tmp_path / "out"
    assert command(file, "--tokenizer", tokenizer, "--out", out) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error:") and "--map question=FIELD" in line and not out.exists()
    assert command(file, "--tokenizer", tokenizer, "--out", out, "--map", "question=p.text", "--workers", 1) == 0
    assert "1 rows in, 1 traces, 1 kept" in capsys.readouterr().err
    assert command(file, "--map", "question=p.text", "--show", 1) == 0
    shown = capsys.readouterr().out
    assert "[question] q" in shown and "[answer] a" in shown


@pytest.mark.parametrize("name,content,message", [
    ("a.jsonl", "", "holds no rows"), ("a.jsonl", "hello", "neither JSON nor JSONL"), (None, None, "cannot be read"),
    ("a.jsonl", '{"question": "q", "gt": "4", "response": "5"}', "no trace kept of 1 rows (1 wrong_answer)"),
    ("a.jsonl", '{"question": "q", "response": ""}', "(fields: question, response)"),
    ("a.jsonl", '{"question": "q", "response": "\\ud800"}', "no trace kept of 1 rows (1 not_unicode)"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, tokenizer, capsys, name, content, message):
    file = tmp_path / (name or "missing.jsonl")
    if name:
        file.write_text(content)
    out = tmp_path / "out"
    assert command(file, "--tokenizer", tokenizer, "--out", out) == 2
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if x.startswith("error:")]
    assert len(lines) == 1 and message in lines[0] and not out.exists()
    assert ("--keep all" in lines[0]) == ("wrong_answer" in lines[0])


def test_a_file_that_ends_too_early_leaves_nothing(tmp_path, tokenizer, capsys):
    """It is found out only when shards of its beginning are written; a mended file has another content and name."""
    whole = gzip.compress("".join(json.dumps(sample(i)) + "\n" for i in range(3000)).encode())
    (tmp_path / "in.jsonl.gz").write_bytes(whole[:-2000])
    out = tmp_path / "out"
    assert command(tmp_path / "in.jsonl.gz", "--tokenizer", tokenizer, "--out", out, "--shard-rows", 16) == 2
    assert "cannot be read: Compressed file ended" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("option,value,message", [
    ("--shard-rows", 0, "--shard-rows must be at least 1, got 0"), ("--workers", 0, "--workers must be at least 1"),
    ("--check-timeout", 0, "more than 0 seconds"), ("--out", __file__, "is a file; --out takes the folder"),
])
def test_bad_options_are_named_before_anything_is_read(tmp_path, tokenizer, capsys, option, value, message):
    file, out = write(tmp_path / "in.jsonl", [sample(1)]), tmp_path / "out"
    assert command(file, "--tokenizer", tokenizer, "--out", out, option, value) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not out.exists()


def test_a_foreign_folder_is_left_alone(tmp_path, tokenizer):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty and holds no trace store \(notes.txt\)"):
        run(tmp_path, tokenizer)
    assert os.listdir(tmp_path / "out") == ["notes.txt"]


def test_inputs_are_checked():
    with pytest.raises(ValueError, match="--keep right"):
        Inputs(files=("a",), keep="right")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        Inputs(files=("a",), max_rows=0)
    with pytest.raises(ValueError, match="is a folder"):
        Inputs(files=(os.path.dirname(sys.executable),))


def test_rendering_gives_the_source_text_back(tmp_path, tokenizer, data_dir):
    """The supervised turn holds a teacher's full response, to the character."""
    file = data_dir / "2_traces/r1_math500/math500_deepseek_r1.jsonl.gz"
    import_traces(ImportJob(inputs=Inputs(files=(str(file),), keep="all"), tokenizer=tokenizer, out=str(tmp_path / "o"),
                            workers=1))
    store = TraceStore.open(tmp_path / "o")
    from distill_jax.traces.formats import read_rows

    for i, row in enumerate(read_rows(file)):
        assert row["full_response"] in store.row(i).text
