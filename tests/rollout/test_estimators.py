"""Estimators of single tokens: hand values of the cards, what statistics are over, bad settings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.rewards.repetition import dense_penalty
from distill_jax.rollout.advantages import gae, leave_one_out, returns
from distill_jax.rollout.estimators import Answer, Channel, Gae, Penalised, ReinforcePlusPlus


def answer(reward, n=2, *, logprobs=None, reference=None, values=None, ids=None, group=0, trained=True):
    array = lambda x: None if x is None else np.asarray(x, np.float32)
    return Answer(reward=reward, group=group, ids=np.arange(n, dtype=np.int32) if ids is None else np.asarray(ids),
                  logprobs=array([-1.0] * n if logprobs is None else logprobs), reference=array(reference),
                  values=array(values), trained=trained)


def test_gae_by_hand_with_kl_in_the_reward():
    """Token rewards [-.02, 2.04]; V = [2, 1], gamma .5, lam .4: delta = [-.02 + .5 - 2, 1.04], A = [-1.52 + .2 * 1.04,
    1.04], R = A + V."""
    a = answer(2.0, logprobs=[-1.0, -0.5], reference=[-1.2, -0.1], values=[2.0, 1.0])
    (got,) = Gae(gamma=0.5, lam=0.4, reference="reference", beta=0.1, whiten=False)([a])
    np.testing.assert_allclose(got["advantages"], [-1.312, 1.04], rtol=1e-5)
    np.testing.assert_allclose(got["returns"], [0.688, 2.04], rtol=1e-5)
    np.testing.assert_array_equal(got["old_values"], [2.0, 1.0])


def test_without_values_what_is_left_are_returns():
    a = answer(1.5, 4, values=[0.0] * 4)
    for estimator in (Gae(lam=1.0, whiten=False), Gae(lam=1.0, whiten=False, critic="")):
        (got,) = estimator([a if estimator.critic else answer(1.5, 4)])
        assert tuple(got) == estimator.fields
        np.testing.assert_allclose(got["advantages"], [1.5] * 4)
        if estimator.critic:
            np.testing.assert_array_equal(got["returns"], got["advantages"])


def test_two_gammas_by_hand():
    """Card: ids [1,2,1,2], N = 2 -> penalties [0,0,-.05,-.05]; sum_k .99^k r_rep(t+k) + r_cos, minus V."""
    channel = Channel(fn=dense_penalty, kwargs={"n": 2}, gamma=0.99)
    estimator = Gae(lam=1.0, channels={"repetition": channel}, whiten=False)
    (got,) = estimator([answer(1.5, 4, ids=[1, 2, 1, 2], values=[0.5] * 4)])
    rep = [-0.05 * (0.99 ** 2 + 0.99 ** 3), -0.05 * (0.99 + 0.99 ** 2), -0.05 * 1.99, -0.05]
    np.testing.assert_allclose(got["advantages"], np.array(rep) + 1.0, rtol=1e-6)
    np.testing.assert_allclose(got["returns"], np.array(rep) + 1.5, rtol=1e-6)


def test_whitening_is_over_trained_tokens_and_leaves_returns_alone():
    said = [answer(1.0, 3, values=[0.0] * 3), answer(0.0, 1, values=[0.0]), answer(50.0, 2, values=[0.0] * 2,
                                                                                   trained=False)]
    raw, white = (Gae(lam=1.0, whiten=w)(said) for w in (False, True))
    trained = np.concatenate([x["advantages"] for x in white[:2]])
    np.testing.assert_allclose(trained, (np.array([1, 1, 1, 0]) - 0.75) / 0.5, atol=1e-6)
    np.testing.assert_allclose(white[2]["advantages"], (50 - 0.75) / 0.5, rtol=1e-6)
    for a, b in zip(raw, white, strict=True):
        np.testing.assert_array_equal(a["returns"], b["returns"])
    assert Gae()([]) == []


def test_reinforce_plus_plus_hand_values():
    """Card: two responses of 2 tokens, R = 1, 0, beta = 0: +-.8660 (ddof 1) or +-1 (ddof 0)."""
    for ddof, want in ((1, 0.8660), (0, 1.0)):
        got = ReinforcePlusPlus(ddof=ddof)([answer(1.0), answer(0.0), answer(9.0, 5, trained=False)])
        np.testing.assert_allclose(np.concatenate([x["advantages"] for x in got[:2]]), [want, want, -want, -want],
                                   atol=5e-5)
        assert tuple(got[0]) == ReinforcePlusPlus().fields == ("advantages",)


def test_rloo_with_kl_in_the_reward():
    """KL = .5 and -.5: rewards .95 and .05, each minus the other; a group of one has 0."""
    said = [answer(1.0, reference=[-1.25, -1.25]), answer(0.0, reference=[-0.75, -0.75]),
            answer(7.0, 1, reference=[-9.0], group=4)]
    got = Penalised(beta=0.1)(said)
    assert [x["advantages"].round(6).tolist() for x in got] == [[0.9, 0.9], [-0.9, -0.9], [0.0]]
    rewards, groups = np.array([0.95, 0.05, 7.0 - 0.8]), np.array([0, 0, 4])
    np.testing.assert_allclose([x["advantages"][0] for x in got], leave_one_out(rewards, groups), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1), st.floats(-3, 3))
def test_answers_do_not_see_each_other_without_whitening(values, gamma, lam, reward):
    mine, other = answer(reward, len(values), values=values), answer(5.0, 3, values=[1.0, 2.0, 3.0])
    estimator = Gae(gamma=gamma, lam=lam, whiten=False)
    (alone,), (_, beside) = estimator([mine]), estimator([other, mine])
    np.testing.assert_array_equal(alone["advantages"], beside["advantages"])
    rewards = np.zeros(len(values))
    rewards[-1] = reward
    np.testing.assert_allclose(alone["advantages"], gae(rewards, np.float32(values), gamma=gamma, lam=lam))
    if lam == 1.0:
        np.testing.assert_allclose(alone["returns"], returns(rewards, gamma), atol=1e-5)


@pytest.mark.parametrize("make,match", [
    (lambda: Gae(beta=0.1), "needs beta > 0 and reference"), (lambda: Gae(reference="r"), "needs beta > 0"),
    (lambda: ReinforcePlusPlus(beta=-1.0, reference="r"), "beta=-1.0"), (lambda: Penalised(beta=0.0), "beta=0.0"),
    (lambda: Gae(gamma=1.5), r"Gae.gamma must be in \[0, 1\], got 1.5"), (lambda: Gae(lam=-0.1), "Gae.lam"),
    (lambda: Gae(channels={"x": Channel(fn=dense_penalty)}), "needs lam=1, got lam=0.95"),
    (lambda: Gae(lam=1.0, channels={"x": Channel(fn=dense_penalty, gamma=2.0)}), "channels.x.gamma"),
    (lambda: Gae(lam=1.0, channels={"outcome": Channel(fn=dense_penalty)}), "name this one differently")])
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()
