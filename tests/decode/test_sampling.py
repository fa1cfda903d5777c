"""The sampling rules against hand values, a NumPy reference and observed frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from distill_jax.decode.sampling import Sampling, choose, filtered, keep_min_p, keep_top_k, keep_top_p, row_keys

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))


def kept(logits) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Probabilities [N] in float64 by sorting and looping: temperature, top-k, top-p, min-p, each renormalised."""
    z = logits.astype(np.float64) / s.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    if s.top_k:
        order = np.lexsort((np.arange(len(p)), -p))
        p[order[s.top_k:]] = 0
        p /= p.sum()
    if s.top_p < 1:
        mass, keep = 0.0, []
        for i in np.argsort(-p, kind="stable"):
            if mass >= s.top_p:
                break
            keep.append(i)
            mass += p[i]
        p = np.where(np.isin(np.arange(len(p)), keep), p, 0)
        p /= p.sum()
    p = np.where(p >= s.min_p * p.max(), p, 0)
    return p / p.sum()


@pytest.mark.parametrize("p, want", [(0.01, [0]), (0.39, [0]), (0.41, [0, 1]), (0.69, [0, 1]), (0.71, [0, 1, 2]),
                                     (0.999, [0, 1, 2, 3, 4])])
def test_top_p_by_hand(p, want):
    assert kept(keep_top_p(jnp.asarray(LOGITS)[None], p)) == want


@pytest.mark.parametrize("p, want", [(1.0, [0]), (0.7, [0, 1]), (0.4, [0, 1, 2]), (0.11, [0, 1, 2, 3])])
def test_min_p_by_hand(p, want):
    assert kept(keep_min_p(jnp.asarray(LOGITS)[None], p)) == want


def test_ties():
    flat = jnp.zeros((1, 6), jnp.float32)
    assert keep_top_k(flat, 2)[1].tolist() == [[0, 1]]  # exactly k, lower ids first
    assert kept(keep_top_p(flat, 0.3)) == [0, 1, 2, 3, 4, 5]  # what ties with the last one stays
    assert keep_top_k(flat, 10)[0].shape == (1, 6)


def test_impossible_ids_stay_impossible():
    """Vocabulary padding has a huge negative logit: no rule and no noise brings it back."""
    logits = jnp.full((4000, 8), -1e30, jnp.float32).at[:, :3].set(0.0)
    for s in (Sampling(temperature=5.0), Sampling(temperature=5.0, top_k=6), Sampling(temperature=5.0, top_p=0.999)):
        assert set(np.asarray(choose(logits, row_keys(jnp.arange(4000, dtype=jnp.uint32)), s)[0])) == {0, 1, 2}


RULES = [
    Sampling(temperature=1.0), Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=4),
    Sampling(temperature=1.3, top_p=0.8), Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_frequencies(rule):
    rng = np.random.default_rng(0)
    logits, n = rng.normal(0, 1.5, 12).astype(np.float32), 20_000
    want = reference(logits, rule)
    keys = row_keys(jnp.arange(n, dtype=jnp.uint32))
    tokens, logprobs = choose(jnp.broadcast_to(jnp.asarray(logits)[None], (n, 12)), keys, rule)
    tokens = np.asarray(tokens)
    assert want[tokens].min() > 0, "an excluded outcome was drawn"
    seen, p = np.bincount(tokens, minlength=12)[want > 0], want[want > 0]
    assert chisquare(seen, p * n).pvalue > 1e-3
    np.testing.assert_allclose(np.asarray(logprobs), np.log(want[tokens]), atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.3, 3), st.integers(0, 8), st.floats(0.05, 1), st.floats(0, 0.9))
def test_rules_composed(seed, temperature, top_k, top_p, min_p):
    """The distribution that is left, against the reference."""
    logits = np.random.default_rng(seed).normal(0, 2, (1, 8)).astype(np.float32)
    rule = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    left, ids = filtered(jnp.asarray(logits), rule)
    probs = np.zeros(8)
    probs[np.arange(8) if ids is None else np.asarray(ids)[0]] = np.asarray(jax.nn.softmax(left, -1))[0]
    ordered = np.sort(reference(logits[0], Sampling(temperature=temperature, top_k=top_k)))[::-1]
    edges = np.concatenate([np.cumsum(ordered) - top_p, ordered / ordered.max() - min_p])
    if np.abs(edges).min() > 1e-5:  # on an edge, float32 and float64 may differ by one outcome
        np.testing.assert_allclose(probs, reference(logits[0], rule), atol=1e-6)


def test_greedy_takes_the_first_maximum():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]], jnp.float32)
    token, logprob = choose(logits, row_keys(jnp.asarray([1, 2], jnp.uint32)), Sampling())
    assert token.tolist() == [1, 0] and logprob.tolist() == [0.0, 0.0]


def test_a_row_does_not_see_its_neighbours():
    rng = np.random.default_rng(1)
    logits, seeds = rng.normal(size=(16, 20)).astype(np.float32), np.arange(16, dtype=np.uint32)
    rule = Sampling(temperature=1.0, top_p=0.9)
    both = np.asarray(choose(jnp.asarray(logits), row_keys(jnp.asarray(seeds)), rule)[0])
    other = np.roll(logits, 3, 0)
    other[5], moved = logits[5], np.roll(seeds, 3)
    moved[5] = seeds[5]
    assert int(choose(jnp.asarray(other), row_keys(jnp.asarray(moved)), rule)[0][5]) == both[5]
    assert int(choose(jnp.asarray(logits[5:6]), row_keys(jnp.asarray(seeds[5:6])), rule)[0][0]) == both[5]


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.1},
                                 {"max_new_tokens": 0}])
def test_bad_values(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)
