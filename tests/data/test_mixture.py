"""DDK's shares, and a mixed source that is a pure function of step and mixture state."""

import numpy as np
import pytest

from distill_jax.data import mixture
from distill_jax.data.source_specs import DomainGap, Mix, Phases, Store
from distill_jax.data.sources import open_source
from tests.data.storing import make_store, some_traces


def test_hand_values():
    """The card's: g = (2, 1) -> r0 (.731059, .268941), one update r1 (.690399, .309601)."""
    gaps = np.array([4.0, 2.0]) / np.array([2.0, 2.0])
    first = mixture.first_shares(gaps)
    np.testing.assert_allclose(first, [0.731059, 0.268941], atol=1e-6)
    np.testing.assert_allclose(mixture.next_shares(first, gaps, 0.5), [0.690399, 0.309601], atol=1e-6)
    np.testing.assert_allclose(mixture.next_shares(first, gaps, 0.0), [0.5, 0.5])
    np.testing.assert_allclose(mixture.next_shares(np.full(4, 0.25), np.full(4, 3.0), 0.5), 0.25)
    far = mixture.next_shares(np.full(3, 1 / 3), np.array([5000.0, 1.0, 2.0]), 0.5)
    np.testing.assert_allclose(far, [0.5 + 1 / 6, 1 / 6, 1 / 6], atol=1e-12)


def test_rounds():
    state = mixture.initial((3.0, 1.0))
    np.testing.assert_allclose(state["shares"], [0.75, 0.25])
    state = mixture.steered(state, np.array([2.0, 1.0]), 0.5, 0, (0, 0))
    np.testing.assert_allclose(state["shares"], [0.731059, 0.268941], atol=1e-6)
    state = mixture.steered(state, np.array([2.0, 1.0]), 0.5, 10, (29, 11))
    np.testing.assert_allclose(state["shares"], [0.690399, 0.309601], atol=1e-6)
    assert (int(state["since"]), int(state["rounds"]), state["taken"].tolist()) == (10, 2, [29, 11])
    with pytest.raises(ValueError, match="source 1 of the mix is not finite at update 20"):
        mixture.steered(state, np.array([2.0, np.nan]), 0.5, 20, (0, 0))


def test_each_source_is_read_on_without_a_gap_when_shares_change(tmp_path, tiny):
    paths = [str(tmp_path / n) for n in "ab"]
    for seed, path in enumerate(paths):
        make_store(path, some_traces(40, seed=seed), tiny)
    mix = Mix(sources=tuple(Store(path=p, seq_len=96) for p in paths), weights=(1.0, 1.0), rows=6)
    source = open_source(mix, tiny, seed=0)
    state, seen = mixture.initial(mix.weights), []
    for step in range(40):
        if step in (0, 7, 20):
            taken = source.mixed(state).taken_before(step)
            state = mixture.steered(state, np.array([{0: 1.0, 7: 3.0, 20: 0.5}[step], 1.0]), 0.9, step, taken)
        seen.append((state, source.mixed(state).assigned(step)))
    for part in (0, 1):
        read = [at for _, step in seen for p, at in step if p == part]
        assert read == list(range(len(read)))
    share = lambda steps: np.mean([p == 0 for s in steps for p, _ in seen[s][1]])
    assert abs(share(range(7)) - 0.5) < 0.05 and abs(share(range(7, 20)) - seen[8][0]["shares"][0]) < 0.05
    assert abs(share(range(20, 40)) - seen[21][0]["shares"][0]) < 0.05
    again = open_source(mix, tiny, seed=0).mixed(seen[25][0])  # a resumed run has the state and the step, nothing else
    np.testing.assert_array_equal(again.batch(25).main.tokens, source.mixed(seen[25][0]).batch(25).main.tokens)
    with pytest.raises(ValueError, match="holds from update 20 on, asked for 19"):
        again.assigned(19)


def test_specs_that_cannot_be_steered_are_named():
    good = Store(path="a", signals=("token",), holdout=0.1)
    with pytest.raises(ValueError, match=r"holdout > 0 and signals=\('token', ...\) to the sources \['b'\]"):
        Mix(sources=(good, Store(path="b", signals=("token",))), weights=(1.0, 1.0), controller=DomainGap())
    with pytest.raises(ValueError, match="inside Phases cannot be steered"):
        Phases(sources=(Mix(sources=(good,), weights=(1.0,), controller=DomainGap()),), steps=())
