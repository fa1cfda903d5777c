"""Accuracy, gaps and bootstrap against values computed by hand."""

import numpy as np
import pytest

from distill_jax.eval import stats
from distill_jax.eval.records import Record, Records


def record(i, k, position, correct, **kw):
    base = {"id": f"{k}-{position}-{i}", "group": f"{k}-{i}", "correct": bool(correct), "f1": float(correct),
            "axes": {"k": k, "position": position}, "answer": "", "golds": ("x",), "thinking_tokens": 3, "tokens": 5,
            "unterminated": False, "problem": "", "seconds": 0.1}
    return Record(**{**base, **kw})


def records(table, **kw):
    """{(k, position): [correct, ...]}: question j of one k is the same at every position."""
    return Records(rows=tuple(record(j, k, p, c) for (k, p), cs in table.items() for j, c in enumerate(cs)), **kw)


def test_matrix_and_gaps():
    r = records({(4, 0): [1, 1], (4, 1): [1, 0], (4, 2): [0, 0], (4, 3): [1, 1]})
    assert stats.matrix(r)[4] == {0: (1.0, 2), 1: (0.5, 2), 2: (0.0, 2), 3: (1.0, 2)}
    means = np.array([1.0, 0.5, 0.0, 1.0])
    assert stats.max_min_gap(means) == 1.0
    assert stats.ends_minus_middle(means) == 0.75
    assert stats.mean_over_positions(means) == 0.625
    assert np.isnan(stats.ends_minus_middle(means[:2]))
    s = stats.summary(r, resamples=200)
    assert s["mean_accuracy"] == {"4": 0.625} and s["position_gap"]["4"][0] == 1.0
    assert s["middle_gap"]["4"][0] == 0.75 and s["by_position"]["4"]["1"] == [0.5, 2]


def test_mean_over_positions_weighs_positions_not_items():
    r = records({(4, 0): [1] * 10, (4, 1): [0]})
    assert stats.summary(r, resamples=100)["mean_accuracy"]["4"] == 0.5


def test_difference_is_paired_and_matches_the_normal_interval():
    rng = np.random.default_rng(0)
    a = records({(8, 0): rng.random(400) < 0.9})
    b = records({(8, 0): rng.random(400) < 0.5})
    d = np.array([x.correct - 1.0 * y.correct for x, y in zip(a.rows, b.rows, strict=True)])
    got = stats.difference(a, b).by_k(stats.mean_over_positions)[8]
    half = 1.96 * d.std() / 20
    assert got.value == pytest.approx(d.mean())
    assert got.low == pytest.approx(d.mean() - half, abs=0.01) and got.high == pytest.approx(d.mean() + half, abs=0.01)
    same = stats.difference(a, a).by_k(stats.mean_over_positions)[8]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_questions_are_drawn_whole():
    """Every question is right at all positions or at none: the interval is that of 100 questions, not of 800 items."""
    rng = np.random.default_rng(1)
    right = rng.random(100) < 0.5
    together = records({(8, p): right for p in range(8)})
    width = lambda r: (lambda v: v.high - v.low)(
        stats.estimate(stats.grid(r)).by_k(stats.mean_over_positions)[8])
    assert width(together) == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    gap = stats.estimate(stats.grid(together)).by_k(stats.max_min_gap)[8]
    assert (gap.value, gap.low, gap.high) == (0, 0, 0)


def test_grid_of_several_k_with_questions_of_their_own():
    r = records({(2, 0): [1, 0], (4, 0): [1, 1, 1], (4, 1): [0, 1, 1]})
    g = stats.grid(r)
    assert g.cells == ((2, 0), (4, 0), (4, 1)) and len(g.groups) == 5
    assert np.isnan(g.values).sum() == 2 * 2 + 3
    e = stats.estimate(g, resamples=500)
    assert e.means.tolist() == pytest.approx([0.5, 1.0, 2 / 3])
    assert not np.isnan(e.draws[:, 1]).all()


def test_coverage_of_the_gap_interval():
    """With no true position effect, max - min is biased upward; the corrected interval still reaches down to small
    gaps in most samples, where plain percentiles do not."""
    rng = np.random.default_rng(2)
    corrected = plain = 0
    for seed in range(40):
        r = records({(8, p): rng.random(60) < 0.7 for p in range(5)})
        e = stats.estimate(stats.grid(r), seed, 600)
        draws = stats.max_min_gap(e.draws)
        v = stats.interval(float(stats.max_min_gap(e.means)), draws)
        assert v.low <= v.value <= v.high
        corrected += v.low
        plain += np.quantile(draws, 0.025)
    assert corrected < 0.8 * plain


def test_slope_per_doubling():
    a = records({(2, 0): [1] * 10, (4, 0): [1] * 10, (8, 0): [1] * 10})
    b = records({(2, 0): [1] * 10, (4, 0): [1] * 8 + [0] * 2, (8, 0): [1] * 6 + [0] * 4})
    assert stats.slope_per_doubling(stats.difference(a, b)).value == pytest.approx(0.2)
    assert stats.slope_per_doubling(stats.difference(records({(2, 0): [1]}), records({(2, 0): [0]}))) is None
    got = stats.compare({"a": a, "b": b}, "b", ["a"], resamples=300)["a"]
    assert got["difference"]["8"][0] == pytest.approx(0.4) and got["slope_per_doubling"][0] == pytest.approx(0.2)


def test_rows_in_another_order_are_paired_by_id():
    a = records({(2, 0): [1, 0, 1, 1]})
    shuffled = Records(rows=tuple(a.rows[i] for i in (2, 0, 3, 1)))
    d = stats.difference(shuffled, a, resamples=50)
    assert not d.grid.values.any() and set(d.grid.groups) == {r.group for r in a.rows}


def test_different_questions_cannot_be_compared():
    with pytest.raises(ValueError, match="different questions"):
        stats.difference(records({(2, 0): [1]}), records({(2, 1): [1]}))


def test_floor_and_ceiling_stay_out_of_the_means():
    rows = [record(0, 8, 0, 0), record(0, 8, None, 1, id="g", axes={"k": 8, "setting": "gold"}),
            record(0, 8, None, 0, id="n", axes={"k": 8, "setting": "none"})]
    s = stats.summary(Records(rows=tuple(rows)), resamples=50)
    assert (s["mean_accuracy"]["8"], s["oracle"], s["closed_book"]) == (0.0, 1.0, 0.0)


def test_failures_and_axes_are_reported():
    rows = (record(0, 2, 0, 1, axes={"k": 2, "position": 0, "layout": "spread"}),
            record(1, 2, 0, 0, axes={"k": 2, "position": 0, "layout": "adjacent"}, problem="prompt too long: 9"),
            record(2, 2, 0, 0, axes={"k": 2, "position": 0, "layout": "adjacent"}, unterminated=True),
            record(3, 2, 0, 0, axes={"k": 2, "position": 0, "layout": "spread"}, problem="server: 500"))
    s = stats.summary(Records(rows=rows, about={"training_flops": 1e15}), resamples=50)
    assert (s["over_long"], s["unterminated"], s["problems"]) == (0.25, 0.25, 2)
    assert s["by_axis"] == {"layout": {"adjacent": 0.0, "spread": 0.5}} and s["training_flops"] == 1e15


def test_bootstrap_is_seeded():
    r = records({(4, p): np.arange(30) % (p + 2) == 0 for p in range(3)})
    assert stats.summary(r, seed=3, resamples=200) == stats.summary(r, seed=3, resamples=200)
    assert stats.summary(r, seed=3, resamples=200) != stats.summary(r, seed=4, resamples=200)


def test_records_round_trip(tmp_path):
    r = records({(2, 0): [1, 0]}, task="t", model="m", about={"x": 1})
    r.save(tmp_path / "d" / "r.json")
    assert Records.load(tmp_path / "d" / "r.json") == r
