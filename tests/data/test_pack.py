import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.data.pack import plan

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5), window=st.integers(1, 50), pack=st.booleans())
def test_every_short_row_once_and_nothing_too_long(lengths, seed, window, pack):
    lengths = np.array(lengths)
    if (lengths > 32).all():
        with pytest.raises(ValueError, match="no row to train on"):
            plan(lengths, seq_len=32, seed=seed)
        return
    p = plan(lengths, seq_len=32, seed=seed, window=window, pack=pack)
    assert sorted(p.rows.tolist()) == np.flatnonzero(lengths <= 32).tolist()
    sums = [lengths[p.rows[a:b]].sum() for a, b in zip(p.offsets, p.offsets[1:])]
    assert min(sums) > 0 and max(sums) <= 32 and sum(sums) == p.tokens
    assert p.dropped == int((lengths > 32).sum()) and p.cut == 0
    if not pack:
        assert (np.diff(p.offsets) == 1).all()


def test_best_fit_by_hand():
    # capacity 10, longest first: 7 | 6 | 4 joins 6 (fits exactly, before 7's room of 3) | 3 joins 7
    p = plan(np.array([3, 7, 4, 6]), seq_len=10, seed=0)
    bins = sorted(sorted(p.rows[a:b].tolist()) for a, b in zip(p.offsets, p.offsets[1:]))
    assert bins == [[0, 1], [2, 3]] and p.fill == 1.0


def test_pure_function_of_seed_and_position():
    lengths = np.random.default_rng(0).integers(5, 400, 3000)
    a, b, c = (plan(lengths, seq_len=512, seed=s) for s in (1, 1, 2))
    positions = [0, 7, a.sequences - 1, a.sequences, 5 * a.sequences + 3]
    for x in reversed(positions):  # any order of asking
        b.at(x)
    assert all(np.array_equal(a.at(x), b.at(x)) for x in positions)
    assert any(not np.array_equal(a.at(x), c.at(x)) for x in positions)
    for epoch in (0, 3):  # each epoch sees every row once, in its own order
        seen = np.concatenate([a.at(epoch * a.sequences + i) for i in range(a.sequences)])
        assert np.array_equal(np.sort(seen), np.arange(3000))
    assert not np.array_equal(a.order(0), a.order(1))
    assert a.fill > 0.97


def test_cut_and_row_numbers():
    p = plan(np.array([50, 3, 2]), rows=np.array([100, 200, 300]), seq_len=10, seed=0, over_long="cut")
    assert sorted(p.rows.tolist()) == [100, 200, 300] and (p.cut, p.dropped, p.tokens) == (1, 0, 15)
