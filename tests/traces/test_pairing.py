"""Builders of pairs and singles: hand values, ties, limits, determinism, questions without a pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.core import spec
from distill_jax.traces.pairing import Answers, BestWorst, RightWrong, Shortest, Singles, build_units

BUILDERS = (RightWrong(), RightWrong(limit=3), RightWrong(limit=None), Shortest(), Shortest(against="right", limit=2),
            Shortest(against="any", limit=9), BestWorst(), BestWorst(gap=0.5, right=True), Singles(), Singles(limit=2))


def answers(verdicts, lengths=None, scores=None):
    n = len(verdicts)
    return Answers(verdicts=np.array(verdicts, np.int8), lengths=np.array(lengths or [1] * n, np.int64),
                   scores=np.array(scores or [np.nan] * n, np.float64))


def made(build, *args, seed=0):
    return build(answers(*args), np.random.default_rng(seed)).tolist()


def test_best_against_worst():
    """BOLT's card: scores .2 .9 .5 .1 pair 1 with 3; a wrong best cannot be chosen; a small gap gives no pair."""
    scores = [0.2, 0.9, 0.5, 0.1]
    assert made(BestWorst(), [-1] * 4, None, scores) == [[1, 3]]
    assert made(BestWorst(right=True), [1, 0, 1, 0], None, scores) == [[2, 3]]
    assert made(BestWorst(right=True), [0, 0, -1, 0], None, scores) == []
    assert made(BestWorst(gap=0.8), [-1] * 4, None, scores) == [[1, 3]] and made(
        BestWorst(gap=0.81), [-1] * 4, None, scores) == []
    assert made(BestWorst(), [-1] * 4, None, [0.5, 0.5, 0.1, 0.1]) == [[0, 2]], "ties: the first in the store"
    assert made(BestWorst(), [-1] * 3, None, [0.5] * 3) == [], "equal scores make no pair"
    assert made(BestWorst(), [-1] * 3, None, [np.nan, 0.3, 0.2]) == [[1, 2]]


def test_right_against_wrong():
    verdicts = [1, 0, -1, 0, 1]
    product = [[0, 1], [0, 3], [4, 1], [4, 3]]
    assert made(RightWrong(limit=None), verdicts) == product == made(RightWrong(limit=4), verdicts)
    drawn = [made(RightWrong(), verdicts, seed=s) for s in range(40)]
    assert {tuple(d[0]) for d in drawn} == {tuple(p) for p in product} and all(len(d) == 1 for d in drawn)
    assert made(RightWrong(), [1, 1, -1]) == made(RightWrong(limit=None), [0, 0]) == []


def test_shortest_right_against_longest():
    verdicts, lengths = [1, 0, 1, 0, 1, 0], [9, 4, 3, 8, 3, 8]
    assert made(Shortest(), verdicts, lengths) == [[2, 3]], "ties: the first in the store"
    assert made(Shortest(limit=2), verdicts, lengths) == [[2, 3], [2, 5]]
    assert made(Shortest(against="right", limit=2), verdicts, lengths) == [[2, 0]], "an equal length is not longer"
    assert made(Shortest(against="any", limit=2), verdicts, lengths) == [[2, 0], [2, 3]]
    assert made(Shortest(), [0, 0], [1, 2]) == made(Shortest(against="right"), [1], [4]) == []


def test_singles():
    assert made(Singles(), [1, 0, -1, 0]) == [[0, -1], [-1, 1], [-1, 3]]
    some = made(Singles(limit=1), [1, 1, 1, 0, 0, 0], seed=3)
    assert [u[0] >= 0 for u in some] == [True, False] and some != made(Singles(limit=1), [1, 1, 1, 0, 0, 0], seed=5)
    assert Singles().mismatched and not Singles(measure=False).mismatched and not RightWrong().mismatched


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from((1, 0, -1)), st.integers(1, 9), st.integers(0, 4)),
                max_size=30), st.sampled_from(BUILDERS), st.integers(0, 5))
def test_units_of_a_store(rows, build, seed):
    """Sides are answers to one question and differ; verdicts are what the builder says; every question counts once; a
    question's units do not depend on the others."""
    groups = [r[0] for r in rows]
    all_of = answers(*([r[i] for r in rows] for i in (1, 2)), [r[3] / 4 for r in rows])
    content = np.arange(len(rows), dtype=np.uint64)
    built = build_units(build, groups, all_of, seed, content=content)
    assert np.array_equal(built.units, build_units(build, groups, all_of, seed).units), "the same again"
    with_unit = set()
    for a, b in built.units.tolist():
        with_unit.add(groups[max(a, b)])
        assert a != b and (min(a, b) < 0 or groups[a] == groups[b])
        if not isinstance(build, BestWorst):
            assert a < 0 or all_of.verdicts[a] == 1
            assert b < 0 or all_of.verdicts[b] == 0 or isinstance(build, Shortest)
    assert built.questions == len(set(groups)) and built.without == built.questions - len(with_unit)
    for one in set(groups):
        mine = np.array([i for i, g in enumerate(groups) if g == one])
        alone = build_units(build, [one] * len(mine), Answers(verdicts=all_of.verdicts[mine], lengths=all_of.lengths[
            mine], scores=all_of.scores[mine]), seed).units
        whole = [u for u in built.units.tolist() if groups[max(u)] == one]
        assert [[x if x < 0 else int(mine[x]) for x in u] for u in alone.tolist()] == whole


def test_equal_rows_make_no_pair():
    built = build_units(RightWrong(limit=None), ["q"] * 3, answers([1, 0, 0]), 0, content=np.array([7, 7, 8]))
    assert built.units.tolist() == [[0, 2]] and built.equal == 1 and built.without == 0
    assert build_units(RightWrong(), [], answers([]), 0).units.shape == (0, 2)


@pytest.mark.parametrize("bad, says", [
    (lambda: RightWrong(limit=0), "RightWrong.limit is a number of units of a question, at least 1, got 0"),
    (lambda: Shortest(limit=-1), "at least 1, got -1"), (lambda: Singles(limit=0), "Singles.limit"),
    (lambda: BestWorst(score=""), "needs the name of a score"), (lambda: BestWorst(gap=-1.0), "gap >= 0")])
def test_bad_settings(bad, says):
    with pytest.raises(ValueError, match=says):
        bad()


@pytest.mark.parametrize("build", BUILDERS, ids=str)
def test_survives_yaml(build):
    assert spec.load(spec.dump(build)) == build
