"""The report's JSON is the form the quickstart promises; the text says what the numbers say; the pictures are there."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.image import imread

from distill_jax.eval import report, tasks
from distill_jax.eval.records import DOCUMENTS, Answer, Counts, Records
from distill_jax.eval.run import run
from tests.eval.test_stats import record, records


@pytest.fixture
def models():
    rng = np.random.default_rng(0)
    draw = lambda p: records({(k, pos): rng.random(40) < p for k in (2, 8, 16) for pos in sorted({0, k // 2, k - 1})},
                             task="multidoc_qa")
    out = {"thinking": draw(0.95), "answer_only": draw(0.4), "teacher": draw(0.9)}
    more = [record(j, 8, None, 1, id=f"gold{j}", axes={"k": 8, "setting": "gold"}) for j in range(4)]
    return {n: Records(rows=(*r.rows, *more), task=r.task, model=n) for n, r in out.items()}


PLAN = report.Plan(title="Quickstart", compare=("answer_only", "thinking"), teacher="teacher", trained_k=8,
                   extra={"seconds": 321.5}, resamples=200)


def test_report(models, tmp_path):
    value = report.write(tmp_path, models, PLAN)
    assert json.loads((tmp_path / "report.json").read_text()) == value
    assert set(value["students"]) == {"thinking", "answer_only"} and value["seconds"] == 321.5
    thinking, plain = value["students"]["thinking"], value["students"]["answer_only"]
    assert set(thinking["mean_accuracy"]) == {"2", "8", "16"} and thinking["thinking_tokens"] == 3
    got, low, high = value["difference"]["8"]
    assert got == pytest.approx(thinking["mean_accuracy"]["8"] - plain["mean_accuracy"]["8"], abs=1e-3)
    assert low < got < high and low > 0
    assert len(thinking["position_gap"]["8"]) == 3 and value["teacher"]["oracle"] == 1.0
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Quickstart\n\nAt 8 documents, **thinking** answers")
    assert f"{100 * got:+.1f} [" in text and "k=16 *" in text and "- seconds: 321.5" in text
    for name in ("position_curves", "heat_map", "accuracy_by_k", "accuracy_against_tokens"):
        picture = imread(tmp_path / f"{name}.png")
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05
        assert f"({name}.png)" in text


def test_one_model_without_positions(tmp_path):
    rows = tuple(record(i, 0, -1, i % 2, axes={}) for i in range(10))
    value = report.write(tmp_path, {"m": Records(rows=rows, task="answer_match")}, report.Plan(resamples=50))
    assert value["students"]["m"]["accuracy"] == 0.5 and "difference" not in value
    assert not (tmp_path / "position_curves.png").exists() and (tmp_path / "accuracy_against_tokens.png").exists()
    text = (tmp_path / "report.md").read_text()
    assert "| m " in text and "## Accuracy\n" in text and "documents" not in text


def test_the_task_says_what_k_counts(models, tmp_path):
    people = {n: dataclasses.replace(r, unit="people") for n, r in models.items()}
    value = report.write(tmp_path, people, PLAN)
    text = (tmp_path / "report.md").read_text()
    assert value["unit"] == "people" and "At 8 people, **thinking**" in text and "## Accuracy by people" in text
    assert "| people" in text and "more people than in training" in text and "document" not in text
    kept = people["teacher"]
    assert Records.from_json(kept.to_json()) == kept
    old = {k: v for k, v in kept.to_json().items() if k != "unit"}
    assert Records.from_json(old).unit == "documents"
    units = {name: tasks.make(name, **options) for name, options in (
        ("puzzles", {}), ("kv_retrieval", {}), ("long_document", {}), ("multidoc_qa", {}))}
    assert {n: t.unit if isinstance(t, Counts) else DOCUMENTS for n, t in units.items()} == {
        "puzzles": "people", "kv_retrieval": "pairs", "long_document": "sentences", "multidoc_qa": "documents"}
    few = run(tasks.make("puzzles", kind="arithmetic", k=[2], questions=3), lambda qs: [Answer(text="1") for _ in qs])
    assert few.unit == "digits" and len(few) == 3


def test_unknown_names_and_terminal_table(models):
    with pytest.raises(ValueError, match="'nobody'"):
        report.write("unused", models, report.Plan(compare=("nobody", "thinking")))
    text = report.table_text(report.as_json(models, PLAN), models, PLAN)
    assert "answer_only" in text and "gap" in text
