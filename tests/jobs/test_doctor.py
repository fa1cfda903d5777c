"""Each silent failure planted by itself: doctor finds exactly it, and nothing in a healthy store."""

import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from distill_jax.cli.main import build_app
from distill_jax.core.roles import QUESTION
from distill_jax.data.render import render, template_id
from distill_jax.data.source_specs import Store
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.jobs.checks import looks_cut, normalised
from distill_jax.jobs.doctor import examine
from distill_jax.jobs.patient import Patient
from distill_jax.traces.formats import LOOK, detect, read_rows
from distill_jax.traces.store import SignalHeader, StoreHeader, TopKRow, TraceStore
from distill_jax.traces.trace import FLAG_TRUNCATED, Segment, Trace, simple_trace
from tests.data.conftest import CHATML, tiny_folder
from tests.data.storing import make_store, some_traces, topk_of


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("doctor") / "student"))


def real_traces(data_dir) -> list[Trace]:
    out = []
    for name, n in (("1_math/gsm8k/train.jsonl.gz", 40), ("2_traces/r1_math500/pilot_math500_r1.jsonl", 5)):
        rows = list(read_rows(data_dir / name))[:n]
        importer = detect(rows[:LOOK])
        out += [t for i, row in enumerate(rows) for t in importer.records(row, name, i) if isinstance(t, Trace)]
    return out


@pytest.fixture(params=["made", "real"])
def traces(request) -> list[Trace]:
    if request.param == "made":
        return some_traces(40)
    return real_traces(request.getfixturevalue("data_dir"))


def diagnose(path, tok, *, spec=None, **kwargs):
    spec = dataclasses.replace(spec or Store(path=str(path), seq_len=1 << 16), path=str(path))
    return examine(Patient(spec, tok, **kwargs))


def only(report, check, severity) -> str:
    assert {(f.check, f.severity) for f in report.findings} == {(check, severity)}, report.findings
    assert all(f.mend for f in report.findings)
    return report.findings[0].message


def rewritten(path, traces, tok, change):
    """A store whose rendered rows went through `change`."""
    store = TraceStore.create(str(path), StoreHeader(tokenizer=tok.info(), template=template_id(tok)))
    with store.writer() as out:
        for t in traces:
            out.append(change(render(t, tok)))


def test_healthy(tmp_path, tok, traces):
    make_store(tmp_path / "s", traces, tok, signal="topk")
    report = diagnose(tmp_path / "s", tok, vocabularies={"student": tok.real}, teachers={"teacher": tok},
                      spec=Store(path="", seq_len=1 << 16, holdout=0.3))
    assert report.findings == () and len(report.checks) == 8 and report.rows > 20


def test_empty_mask(tmp_path, tok, traces):
    rewritten(tmp_path / "s", traces, tok, lambda r: dataclasses.replace(
        r, roles=np.where(np.arange(len(r.roles)) < len(r.roles) - 1, 3, r.roles).astype(np.uint8)))
    few = diagnose(tmp_path / "s", tok)
    assert not few.findings  # the end token alone still carries a loss
    rewritten(tmp_path / "t", traces, tok, lambda r: dataclasses.replace(r, roles=np.full_like(r.roles, 3)))
    report = diagnose(tmp_path / "t", tok)
    assert {f.check for f in report.findings} == {"empty mask", "EOS"}  # an end token without a role is not learned
    assert "have no supervised token" in report.findings[0].message
    length = min(len(render(t, tok).tokens) for t in traces) - 1
    message = only(diagnose(tmp_path / "s", tok, spec=Store(path="", seq_len=length)), "empty mask", "error")
    assert f"of {len(traces)} rows have no supervised token" in message


def test_think_tag_differs_between_teacher_and_student(tmp_path, tok, traces, tiny_teacher_like):
    make_store(tmp_path / "s", traces, tok)
    message = only(diagnose(tmp_path / "s", tok, teachers={"teacher": tiny_teacher_like}), "think tag", "warning")
    assert "for teacher teacher" in message


@pytest.fixture
def tiny_teacher_like(tmp_path) -> Tokenizer:
    return load_tokenizer(tiny_folder(tmp_path / "teacher", think=False))


def test_think_tag_merges_with_its_surroundings(tmp_path, tiny_teacher_like):
    """Without a token of its own, the tag is cut by what stands before it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(["well.\n</think>", "four.\n</think>"] * 20, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = tmp_path / "merging"
    folder.mkdir()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    merging = load_tokenizer(folder)
    traces = [simple_trace(f"q{i}", "all is well." if i % 2 else "x y", "fine.") for i in range(10)]
    make_store(tmp_path / "s", traces, merging)
    assert "merges with the text" in only(diagnose(tmp_path / "s", merging), "think tag", "warning")


def test_template_drift(tmp_path, tok, traces):
    make_store(tmp_path / "s", traces, tok, signal="topk")
    drifted = load_tokenizer(tiny_folder(tmp_path / "drifted", template="<|im_start|>now" + CHATML))
    assert drifted.hash == tok.hash
    message = only(diagnose(tmp_path / "s", drifted), "template drift", "warning")
    assert "first difference" in message


def test_other_tokenizer(tmp_path, tok, traces):
    make_store(tmp_path / "s", traces, tok, signal="topk")
    stranger = load_tokenizer(tiny_folder(tmp_path / "x", vocabulary=340))
    report = diagnose(tmp_path / "s", stranger, spec=Store(path="", seq_len=1 << 16, signals=("topk",)))
    assert "learned vocabularies differ" in only(report, "template drift", "error")


def test_padded_vocabulary(tmp_path, tok, traces):
    make_store(tmp_path / "s", traces, tok)
    report = diagnose(tmp_path / "s", tok, vocabularies={"student": tok.real + 136})
    assert "136 are padding" in only(report, "padded vocabulary", "note")
    assert "the head of student has" in only(diagnose(tmp_path / "s", tok, vocabularies={"student": tok.real - 1}),
                                             "padded vocabulary", "error")


def test_signal_on_padding(tmp_path, tok, traces):
    store = make_store(tmp_path / "s", traces, tok)
    with store.signal_writer("topk", SignalHeader(kind="topk", k=4)) as out:
        for i in range(len(store)):
            row = topk_of(store.row(i), 4, tok.real)
            ids = row.ids.copy()
            ids[:, 3] = tok.real + 5
            out.append(TopKRow(ids=ids, logprobs=row.logprobs, mask=row.mask))
    assert "of its mass to padding" in only(diagnose(tmp_path / "s", tok), "padded vocabulary", "error")


def cut_short(t: Trace) -> Trace:
    words = t.answer.split()
    text = " ".join(words[:max(1, len(words) // 2)]) + " and so the"
    return t.replace(segments=(*t.segments[:-1], Segment(role=t.segments[-1].role, text=text)))


def test_truncated_answers(tmp_path, tok, traces):
    cut = [cut_short(t) if i % 4 == 0 else t for i, t in enumerate(traces)]
    make_store(tmp_path / "s", cut, tok)
    assert "look as if they were cut off" in only(diagnose(tmp_path / "s", tok), "truncated answers", "warning")
    flagged = [t.replace(flags=(FLAG_TRUNCATED,)) if i % 4 == 0 else t for i, t in enumerate(traces)]
    make_store(tmp_path / "t", flagged, tok)
    assert "they are left out" in only(diagnose(tmp_path / "t", tok), "truncated answers", "note")
    spec = Store(path="", seq_len=1 << 16, over_long="cut")
    assert "no whole answer" in only(diagnose(tmp_path / "t", tok, spec=spec), "truncated answers", "error")


def test_duplicate_questions_across_splits(tmp_path, tok, traces):
    """The same questions in capitals, without punctuation: another group, so another split for many of them."""
    loud = lambda s: Segment(role=s.role, text=s.text.upper().replace("?", " ?")) if s.role is QUESTION else s
    again = [t.replace(group=f"other-{i}", segments=tuple(map(loud, t.segments))) for i, t in enumerate(traces)]
    make_store(tmp_path / "s", [*traces, *again], tok)
    spec = Store(path="", seq_len=1 << 16, holdout=0.4)
    assert "nearly the same words" in only(diagnose(tmp_path / "s", tok, spec=spec), "duplicate questions", "error")


def test_questions_of_an_evaluation_file(tmp_path, tok):
    traces = some_traces(20)
    make_store(tmp_path / "s", traces, tok)
    rows = [{"question": t.question + " !", "answer": "It is 1.\n#### 1"} for t in traces[:7]]
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    report = diagnose(tmp_path / "s", tok, against=[str(tmp_path / "eval.jsonl")])
    assert "7 of 7 questions" in only(report, "duplicate questions", "error")


def test_missing_end_token(tmp_path, tok, traces):
    drop = lambda r: dataclasses.replace(r, **{f: getattr(r, f)[:-1] for f in ("tokens", "roles", "steps", "parts",
                                                                              "spans")})
    rewritten(tmp_path / "s", traces, tok, drop)
    assert "do not end with a supervised end token" in only(diagnose(tmp_path / "s", tok), "EOS", "error")


def test_wrong_bos(tmp_path, traces):
    folder = tiny_folder(tmp_path / "bos", template="<|endoftext|>" + CHATML)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|endoftext|>",
                                                                       "add_bos_token": True}))
    good = load_tokenizer(folder)
    make_store(tmp_path / "s", traces, good)
    assert diagnose(tmp_path / "s", good).findings == ()
    double = lambda r: dataclasses.replace(r, **{f: np.concatenate([getattr(r, f)[:1], getattr(r, f)]) for f in (
        "tokens", "roles", "steps", "parts", "spans")})
    rewritten(tmp_path / "d", traces, good, double)
    assert "begin with two '<|endoftext|>'" in only(diagnose(tmp_path / "d", good), "BOS", "error")
    rewritten(tmp_path / "m", traces, good, lambda r: dataclasses.replace(r, **{
        f: getattr(r, f)[1:] for f in ("tokens", "roles", "steps", "parts", "spans")}))
    assert "do not begin with" in only(diagnose(tmp_path / "m", good), "BOS", "warning")


@pytest.mark.parametrize("kind", ["topk", "token"])
@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_signal(tmp_path, tok, traces, kind, shift):
    make_store(tmp_path / "s", traces, tok, signal=kind, shift=shift)
    message = only(diagnose(tmp_path / "s", tok), "shifted signal", "error")
    assert f"describes the token at t{-shift:+d}" in message


def test_healthy_token_signal(tmp_path, tok, traces):
    make_store(tmp_path / "s", traces, tok, signal="token")
    assert diagnose(tmp_path / "s", tok).findings == ()


def test_looks_cut():
    whole = ["The answer is 42.", "42", "\\boxed{\\frac{1}{2}}", "#### 18", "```py\nx\n```", "so $x = 2$", "B", "Yes"]
    cut = ["The answer is", "so \\boxed{\\frac{1}{", "```py\nx = 1", "we get 3 +", "first, second,", "Now add the"]
    assert [looks_cut(simple_trace("q", "", a)) for a in whole] == [False] * len(whole)
    assert [looks_cut(simple_trace("q", "", a)) for a in cut] == [True] * len(cut)
    assert normalised("What's 2 + 2?") == normalised("what s 2   2") != normalised("What's 2 + 3?")


def test_commands(tmp_path, tok, monkeypatch):
    """`doctor` and `batch` on a store, by way of the command line."""
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
    make_store(tmp_path / "s", some_traces(12), tok, signal="topk")
    app, run = build_app(["doctor", "batch"]), CliRunner()
    healthy = run.invoke(app, ["doctor", str(tmp_path / "s")])
    assert healthy.exit_code == 0 and "nothing found" in healthy.output
    rewritten(tmp_path / "bad", some_traces(6), tok, lambda r: dataclasses.replace(r, roles=np.full_like(r.roles, 3)))
    bad = run.invoke(app, ["doctor", str(tmp_path / "bad"), "--json"])
    assert bad.exit_code == 1 and json.loads(bad.output)[0]["findings"][0]["check"] == "empty mask"
    shown = run.invoke(app, ["batch", str(tmp_path / "s"), "--rows", "2", "--signal", "topk", "--tokens", "9"])
    assert shown.exit_code == 0, shown.output
    assert "supervised tokens" in shown.output and "'<think>'" in shown.output and "tail 0." in shown.output
    assert run.invoke(app, ["batch", str(tmp_path / "s"), "--row", "99"]).exit_code != 0


RECIPE = """
from distill_jax.data.source_specs import Mix, Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.models.config import ModelConfig
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Stage, Student

def recipe():
    config = ModelConfig(vocab_size={vocab}, hidden_size=16, mlp_size=32, num_layers=1, num_heads=2, num_kv_heads=1,
                         head_dim=8, context_length=512)
    store = Store(path={path!r}, rows=2, seq_len=256)
    return Recipe(name="r", stages=(
        Stage(name="one", source=store, providers={{"student": Student(config=config, tokenizer={tok!r})}},
              terms={{"ce": Term(loss=cross_entropy)}}, steps=2),
        Stage(name="two", source=Mix(sources=(store, store), weights=(1.0, 1.0), rows=4),
              providers={{"student": Student(config=config, tokenizer={tok!r})}},
              terms={{"ce": Term(loss=cross_entropy)}}, steps=2)))
"""


def test_commands_on_a_recipe(tmp_path, tok):
    make_store(tmp_path / "s", some_traces(12), tok)
    tok.save(tmp_path / "tok")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(vocab=tok.real + 24, path=str(tmp_path / "s"), tok=str(tmp_path / "tok")))
    app, run = build_app(["doctor", "batch"]), CliRunner()
    found = run.invoke(app, ["doctor", str(recipe), "--json"])
    assert found.exit_code == 0, found.output
    (finding,) = json.loads(found.output)[0]["findings"]
    assert finding["check"] == "padded vocabulary" and "24 are padding" in finding["message"]
    assert len(json.loads(run.invoke(app, ["doctor", str(recipe), "--stage", "two", "--json"]).output)) == 2
    shown = run.invoke(app, ["batch", str(recipe), "--stage", "two", "--row", "3", "--set", "source.rows=8"])
    assert shown.exit_code == 0 and "step 0: 8 x 256" in shown.output, shown.output
    lost = run.invoke(app, ["batch", str(recipe), "--stage", "three"])
    assert "has no training stage 'three'" in str(lost.exception)
