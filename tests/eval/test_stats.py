"""Accuracy, gaps and bootstrap against values computed by hand."""

import numpy as np
import pytest

from distill_jax.eval import stats
from distill_jax.eval.grade import best_subspan, contains, exact, grader
from distill_jax.eval.records import Answer, Item, Record, Records, run


def record(i, k, position, correct, **kw):
    base = {"id": str(i), "correct": correct, "axes": {"k": k, "position": position}, "answer": "", "golds": ("x",),
            "thinking_tokens": 3, "tokens": 5, "unterminated": False, "over_long": False, "seconds": 0.1}
    return Record(**{**base, **kw})


def records(table):
    """{(k, position): [correct, ...]}"""
    rows = [record(f"{k}-{p}-{j}", k, p, bool(c)) for (k, p), cs in table.items() for j, c in enumerate(cs)]
    return Records(rows=tuple(rows))


def test_grades_of_the_card():
    assert best_subspan("The Beatles!", ("beatles",))
    assert not best_subspan("x\nParis", ("Paris",))
    assert best_subspan("\n\n Paris is it", ("Paris",)), "leading newlines do not cut the answer away"
    assert not best_subspan("anything", ("*",)), "a gold that normalises to nothing matches nothing"
    assert exact("The  cat.", ("cat",)) and not exact("cats", ("cat",))
    assert contains("{'v': 'AB-1'}", ("ab-1",))


def test_run_grades_only_finished_answers_and_skips_nothing():
    items = [Item(id=str(i), question="q", golds=("oslo",), axes={"k": 1, "position": 0}, kind="qa") for i in range(3)]
    said = [Answer(text="Oslo"), Answer(text="Oslo", finished=False), Answer(text="", over_long=True)]
    out = run(items, lambda qs: said, grader())
    assert [r.correct for r in out.rows] == [True, False, False]
    assert [r.unterminated for r in out.rows] == [False, True, False] and out.rows[2].over_long
    with pytest.raises(ValueError, match="empty gold"):
        run([Item(id="1", question="q", golds=("",))], lambda qs: said, grader())


def test_matrix_and_gaps():
    r = records({(4, 0): [1, 1], (4, 1): [1, 0], (4, 2): [0, 0], (4, 3): [1, 1]})
    assert stats.matrix(r)[4] == {0: (1.0, 2), 1: (0.5, 2), 2: (0.0, 2), 3: (1.0, 2)}
    gap = stats.position_gap(r)[4]
    assert gap["max_min"].value == 1.0 and gap["ends_minus_middle"].value == pytest.approx(1 - 0.25)
    assert gap["max_min"].low <= 1.0 <= gap["max_min"].high


def test_difference_is_paired_and_matches_the_normal_interval():
    rng = np.random.default_rng(0)
    a = records({(8, 0): rng.random(400) < 0.9})
    b = records({(8, 0): rng.random(400) < 0.5})
    d = a.correct() - b.correct()
    got = stats.difference(a, b)[8]
    half = 1.96 * d.std() / 20
    assert got.value == pytest.approx(d.mean())
    assert got.low == pytest.approx(d.mean() - half, abs=0.01) and got.high == pytest.approx(d.mean() + half, abs=0.01)
    same = stats.difference(a, a)[8]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_slope_per_doubling():
    a = records({(2, 0): [1] * 10, (4, 0): [1] * 10, (8, 0): [1] * 10})
    b = records({(2, 0): [1] * 10, (4, 0): [1] * 8 + [0] * 2, (8, 0): [1] * 6 + [0] * 4})
    assert stats.slope(a, b).value == pytest.approx(0.2)


def test_different_questions_cannot_be_compared():
    with pytest.raises(ValueError, match="different questions"):
        stats.difference(records({(2, 0): [1]}), records({(2, 1): [1]}))


def test_records_round_trip(tmp_path):
    r = records({(2, 0): [1, 0]})
    r.save(tmp_path / "r.jsonl")
    assert Records.load(tmp_path / "r.jsonl") == r
