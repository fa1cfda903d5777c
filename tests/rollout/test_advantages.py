"""Advantages and filters: hand values of the method cards, ragged groups, rewards that could not be given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.rollout.advantages import (
    all_correct,
    batch_z,
    gae,
    group_mean,
    group_z,
    in_window,
    leave_one_out,
    minus,
    multi_gamma,
    pass_rates,
    penalised,
    positive_only,
    raw,
    reinforce_plus_plus,
    returns,
    spread,
    token_rewards,
    zero_variance,
)

ONE = np.zeros(4, int)


@pytest.mark.parametrize("fn,rewards,want", [
    (group_z, [1, 0, 0, 1], [0.8660, -0.8660, -0.8660, 0.8660]), (group_z, [1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),
    (lambda r, g: group_z(r, g, ddof=0), [1, 0, 0, 1], [1, -1, -1, 1]), (group_z, [1, 1, 1, 1], [0, 0, 0, 0]),
    (group_mean, [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
    (leave_one_out, [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3])])
def test_grpo_dr_grpo_rloo_hand_values(fn, rewards, want):
    np.testing.assert_allclose(fn(rewards, ONE), want, atol=5e-5)


def test_s_grpo_concise_r_and_adapt_think_hand_values():
    np.testing.assert_allclose(group_mean([0, 1, 0.5, 0, 0.25], np.zeros(5)), [-0.35, 0.65, 0.15, -0.35, -0.10])
    np.testing.assert_allclose(group_z([1.9, 1.8, 1.7], np.zeros(3)), [1, 0, -1], atol=1e-4)
    delta = 0.05  # right/NoThink, wrong/NoThink, right/Think, wrong/Think
    np.testing.assert_allclose(minus(np.array([1, 0, 1, 0]) + delta * np.array([1, 1, 0, 0]), 0.75),
                               [0.30, -0.70, 0.25, -0.75])


def test_reinforce_plus_plus_hand_values():
    tokens = [token_rewards(r, [-1.0, -1.0]) for r in (1.0, 0.0)]
    np.testing.assert_allclose(np.concatenate(reinforce_plus_plus(tokens)), [0.8660, 0.8660, -0.8660, -0.8660],
                               atol=5e-5)
    np.testing.assert_allclose(np.concatenate(reinforce_plus_plus(tokens, ddof=0)), [1, 1, -1, -1], atol=1e-5)
    assert [len(a) for a in reinforce_plus_plus([[1.0], [0, 0, 2.0]])] == [1, 3] and reinforce_plus_plus([]) == []


def test_kl_in_the_reward():
    np.testing.assert_allclose(token_rewards(2.0, [-1.0, -0.5], [-1.2, -0.1], beta=0.1), [-0.02, 2.04])
    np.testing.assert_allclose(penalised([1.0, 0.0], [0.5, -0.5], beta=0.1), [0.95, 0.05])
    assert len(token_rewards(1.0, [])) == 0


def test_gae_by_hand():
    """delta = [0 + .5 * 1 - 2, 3 - 1]; A = [-1.5 + .5 * .4 * 2, 2]."""
    np.testing.assert_allclose(gae([0, 3.0], [2.0, 1.0], gamma=0.5, lam=0.4), [-1.1, 2.0])
    rng = np.random.default_rng(0)
    r, v = rng.normal(size=7), rng.normal(size=7)
    np.testing.assert_allclose(gae(r, v, gamma=0.9), returns(r, 0.9) - v)
    np.testing.assert_allclose(gae(r, v, gamma=0.9, lam=0.0), r + 0.9 * np.append(v[1:], 0) - v)
    np.testing.assert_allclose(returns(r, 0.9)[2], sum(0.9 ** k * r[2 + k] for k in range(5)))


def test_two_gamma_returns():
    """Card: sum_k .99^k r_rep(t+k) + r_cos."""
    rep, cos = np.array([0, 0, -0.05, -0.05]), np.array([0, 0, 0, 1.5])
    got = multi_gamma({"rep": rep, "cos": cos}, {"rep": 0.99, "cos": 1.0}, [0.5] * 4)
    want = [sum(0.99 ** k * rep[t + k] for k in range(4 - t)) + 1.5 - 0.5 for t in range(4)]
    np.testing.assert_allclose(got, want)
    with pytest.raises(ValueError, match="lam=1"):
        multi_gamma({"a": rep}, {"a": 1.0}, [0.5] * 4, lam=0.9)
    with pytest.raises(ValueError, match="same names"):
        multi_gamma({"a": rep}, {"b": 1.0})


def test_spread_positive_and_batch():
    assert [a.tolist() for a in spread([1.0, -2.0], [2, 3])] == [[1, 1], [-2, -2, -2]]
    np.testing.assert_array_equal(positive_only([1, -1, np.nan, 0]), [1, 0, 0, 0])
    np.testing.assert_array_equal(positive_only([1, -1], [0, 0]), [1, 0])  # as a round calls it
    np.testing.assert_array_equal(raw([1, -1, np.nan], [0, 0, 1]), [1, -1, 0])
    assert np.all(batch_z([0.1, 0.1, 0.1]) == 0) and np.all(batch_z([3.0]) == 0)
    with pytest.raises(ValueError, match="as many advantages"):
        spread([1.0], [2, 3])


def test_filters():
    groups = [7, 3, 7, 3, 5, 7]
    correct = [1, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(zero_variance(correct, groups), [0, 1, 0, 1, 1, 0])
    np.testing.assert_allclose(pass_rates(correct, groups), [2 / 3, 1, 2 / 3, 1, 0, 2 / 3])
    np.testing.assert_array_equal(in_window(correct, groups, inclusive=False), [1, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(in_window(correct, groups, low=0.5), [1, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(all_correct(correct, groups), [0, 1, 0, 1, 0, 0])
    with pytest.raises(ValueError, match="one group number a sample"):
        zero_variance([1, 2], [1])


@pytest.mark.parametrize("fn", [group_mean, group_z, leave_one_out])
def test_a_reward_that_could_not_be_given_is_left_out(fn):
    got = fn([1.0, np.nan, 0.0, 0.0], ONE)
    np.testing.assert_allclose(got[[0, 2, 3]], fn([1.0, 0.0, 0.0], np.zeros(3)), rtol=1e-12)
    assert got[1] == 0 and np.all(fn([np.nan, np.nan], [1, 1]) == 0) and np.all(fn([], []) == np.zeros(0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=12), st.randoms())
def test_groups_are_ragged_and_in_any_order(samples, random):
    """Each group alone gives the same; order does not matter; RLOO is G/(G-1) times the mean's; sums are 0."""
    groups, rewards = (np.array(x) for x in zip(*samples, strict=True))
    order = list(range(len(samples)))
    random.shuffle(order)
    for fn in (group_mean, group_z, leave_one_out):
        whole = fn(rewards, groups)
        np.testing.assert_allclose(fn(rewards[order], groups[order]), whole[order], atol=1e-6)
        for g in set(groups):
            mine = groups == g
            np.testing.assert_allclose(whole[mine], fn(rewards[mine], groups[mine]), atol=1e-6)
            assert abs(whole[mine].sum()) < 1e-5
            n = mine.sum()
            if fn is group_z and np.ptp(rewards[mine]) > 0.1:
                z = (rewards[mine] - rewards[mine].mean()) / rewards[mine].std(ddof=1)
                np.testing.assert_allclose(whole[mine], z, rtol=1e-4, atol=1e-6)
            if fn is leave_one_out and n > 1:
                np.testing.assert_allclose(whole[mine], group_mean(rewards, groups)[mine] * n / (n - 1), atol=1e-9)
