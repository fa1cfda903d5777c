"""Preference losses: hand values of the method cards, NumPy, gradients, packing, extremes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.tokens.aggregate import sequence_mean
from distill_jax.losses.tokens.measures import preference_accuracy, preference_margin, sequence_log_ratio
from distill_jax.losses.tokens.preference import divergence_score, dpo, ipo, kto, odds_ratio, redi, simpo
from tests.losses.sampled import aggregated, tokens_of


def pairs_of(*pairs, reference=None, rows=None, **fields):
    """`Tokens` of (chosen, rejected) lists of log-probs: `rows` says how many pairs stand in each row."""
    rows, laid, better, ids = rows or [1] * len(pairs), [], [], []
    todo = list(pairs)
    for n in rows:
        mine, todo = todo[:n], todo[n:]
        laid.append([list(s) for pair in mine for s in pair])
        better.append([[1 - k] * len(s) for pair in mine for k, s in enumerate(pair)])
        ids.append([[i + 1] * len(s) for i, pair in enumerate(mine) for s in pair])
    tokens = tokens_of(laid, chosen=better, reference=reference, **fields)
    ids = tokens_of(ids).logprobs.astype(jnp.int32)
    return dataclasses.replace(tokens, fields=dict(tokens.fields) | {"pair_ids": ids})


def mean_over_pairs(loss, tokens):
    return aggregated(loss(tokens), tokens, sequence_mean)


def with_margin(u, beta=0.1):
    """One pair with beta (dw - dl) = u."""
    return pairs_of(([-2.0], [-2.0 - u / beta]), reference=-2.0)


def test_dpo_hand_values():
    """Cards: ln 2 at policy = reference for every eps; u=1, eps=.1 -> .413262; u=2, eps=.1 -> .3269; eps 0 is DPO."""
    for eps in (0.0, 0.1, 0.3):
        assert np.isclose(mean_over_pairs(lambda t, e=eps: dpo(t, label_smoothing=e), with_margin(0.0)), math.log(2))
    smoothed = lambda t: dpo(t, label_smoothing=0.1)
    assert np.isclose(mean_over_pairs(smoothed, with_margin(1.0)), 0.413262, atol=1e-6)
    assert np.isclose(mean_over_pairs(smoothed, with_margin(2.0)), 0.3269, atol=5e-5)
    assert np.isclose(mean_over_pairs(dpo, with_margin(2.0)), -math.log(0.8808), atol=5e-5)


def test_cdpo_minimiser():
    """u* = ln((1 - eps) / eps) = 2.197225."""
    slope = jax.grad(lambda lp: mean_over_pairs(lambda t: dpo(t, label_smoothing=0.1), dataclasses.replace(
        tokens, logprobs=lp)))
    tokens = with_margin(2.197225)
    assert np.all(np.abs(slope(tokens.logprobs)) < 1e-6)
    tokens = with_margin(2.0)
    assert slope(tokens.logprobs)[0, 0] < -1e-4


def test_a_common_prefix_cancels_in_dpo_and_not_in_simpo():
    """Marco-o1 v2's prefix mask changes nothing for exact sums; it does for means."""
    whole = pairs_of(([-1.0, -2.0, -0.5], [-1.0, -2.0, -3.0, -1.0]), reference=[[[-0.7, -1, -1], [-0.7, -1, -1, -1]]])
    cut = dataclasses.replace(whole, mask=whole.mask & jnp.asarray([[0, 0, 1, 0, 0, 1, 1]], bool))
    eps = lambda t: dpo(t, label_smoothing=0.1)
    assert np.isclose(mean_over_pairs(eps, whole), mean_over_pairs(eps, cut), atol=1e-6)
    assert abs(mean_over_pairs(simpo, whole) - mean_over_pairs(simpo, cut)) > 0.1
    moved = dataclasses.replace(cut, logprobs=cut.logprobs.at[0, 0].add(-3.0))
    assert mean_over_pairs(eps, moved) == mean_over_pairs(eps, cut), "prefix tokens are not read"


def test_orpo_hand_values():
    """Card: mean probabilities .5 and .25 -> log odds ln 3, loss ln(4/3); equal pair ln 2; certain sequences finite."""
    pair = lambda a, b: pairs_of(([math.log(a)] * 2, [math.log(b)] * 3))
    assert np.isclose(mean_over_pairs(odds_ratio, pair(0.5, 0.25)), 0.287682, atol=1e-6)
    assert np.isclose(mean_over_pairs(odds_ratio, pair(0.3, 0.3)), math.log(2), atol=1e-6)
    assert mean_over_pairs(odds_ratio, pair(0.5, 0.1)) < mean_over_pairs(odds_ratio, pair(0.5, 0.25))
    sure = pair(1.0, 1.0)
    value, grad = jax.value_and_grad(lambda lp: mean_over_pairs(odds_ratio, dataclasses.replace(sure, logprobs=lp)))(
        sure.logprobs)
    assert np.isclose(value, math.log(2)) and np.all(np.isfinite(grad))


def test_redi_hand_values():
    """Card: (-.5, -1.5) and (-2, -4), alpha .8 -> -1.4; alpha 0 is the mean NLL; alpha 1 is antisymmetric."""
    chosen, rejected = [-0.5, -1.5], [-2.0, -4.0]
    value = lambda a, b, alpha: float(mean_over_pairs(lambda t: redi(t, alpha=alpha), pairs_of((a, b))))
    assert np.isclose(value(chosen, rejected, 0.8), -1.4)
    assert np.isclose(value(chosen, rejected, 0.0), 1.0)
    assert np.isclose(value(chosen, rejected, 1.0), -value(rejected, chosen, 1.0))
    assert np.isclose(value(chosen * 2, rejected * 2, 0.8), -1.4)


def test_kto_by_hand():
    tokens = tokens_of([[[-1.0, -1.0], [-3.0]]], reference=[[[-2.0, -1.5], [-1.0]]], chosen=[[[1, 1], [0]]])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    got = kto(tokens, z0=0.5, beta=0.2, desirable=1.3, undesirable=0.7)
    good, bad = 1.3 * (1 - sigmoid(0.2 * (1.5 - 0.5))), 0.7 * (1 - sigmoid(0.2 * (0.5 + 2.0)))
    np.testing.assert_allclose(got, [[good, good, bad]], rtol=1e-5)
    np.testing.assert_allclose(sequence_log_ratio(tokens), [[1.5, 1.5, -2.0]], rtol=1e-6)


@pytest.mark.parametrize("divergence,score", [
    ("reverse_kl", lambda u: np.log(u)), ("forward_kl", lambda u: 1 - 1 / u),
    ("js", lambda u: np.log(2 * u / (1 + u))), ("alpha", lambda u: (1 - u ** -0.3) / 0.3)])
def test_divergence_scores_are_derivatives(divergence, score):
    """f' up to a constant, 0 at u = 1; f itself differentiated by finite differences."""
    f = {"reverse_kl": lambda u: u * np.log(u), "forward_kl": lambda u: -np.log(u),
         "js": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
         "alpha": lambda u: (u ** 0.7 - 0.7 * u - 0.3) / (0.7 * -0.3)}[divergence]
    u = np.array([0.2, 0.7, 1.0, 1.4, 5.0])
    got = np.asarray(divergence_score(jnp.asarray(np.log(u), jnp.float32), divergence, 0.3))
    np.testing.assert_allclose(got, score(u), rtol=1e-4, atol=1e-6)
    slope = (f(u + 1e-5) - f(u - 1e-5)) / 2e-5
    np.testing.assert_allclose(got - got[2], slope - slope[2], rtol=1e-4, atol=1e-5)


def test_alpha_divergence_lies_between_the_kls():
    x = jnp.asarray([-1.0, 0.5, 2.0], jnp.float32)
    np.testing.assert_allclose(divergence_score(x, "alpha", 1e-3), divergence_score(x), rtol=2e-3)
    np.testing.assert_allclose(divergence_score(x, "alpha", 1 - 1e-6), divergence_score(x, "forward_kl"), rtol=1e-4)


LOSSES = {
    "dpo": dpo, "cdpo": lambda t: dpo(t, label_smoothing=0.2), "ipo": ipo, "simpo": simpo, "orpo": odds_ratio,
    "redi": redi, "kto": lambda t: kto(t, z0=0.3),
    **{d: (lambda t, d=d: dpo(t, divergence=d)) for d in ("forward_kl", "js", "alpha")}}


def random_pairs(rows=None, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: [float(x) for x in -rng.exponential(size=n)]
    pairs = [(draw(n), draw(m)) for n, m in ((2, 3), (4, 1), (3, 3), (1, 5))]
    tokens = pairs_of(*pairs, rows=rows)
    reference = tokens.logprobs * 0.8 - 0.1  # a function of the token, so that it moves with it
    return dataclasses.replace(tokens, reference=reference)


@pytest.mark.parametrize("name", LOSSES)
def test_packing_does_not_matter_and_gradients_are_finite_differences(name):
    def total(lp, tokens):
        return mean_over_pairs(LOSSES[name], dataclasses.replace(tokens, logprobs=lp))

    one, packed = random_pairs(), random_pairs(rows=[3, 1])
    values = [jax.value_and_grad(total)(t.logprobs, t) for t in (one, packed)]
    assert np.isclose(values[0][0], values[1][0], rtol=1e-5)
    grads = [np.asarray(g)[np.asarray(t.mask)] for (_, g), t in zip(values, (one, packed))]
    np.testing.assert_allclose(grads[0], grads[1], rtol=1e-4, atol=1e-7)
    for at in ((0, 1), (1, 4), (3, 2)):
        bump = jnp.zeros_like(one.logprobs).at[at].set(1e-2)
        slope = (total(one.logprobs + bump, one) - total(one.logprobs - bump, one)) / 2e-2
        assert np.isclose(values[0][1][at], slope, rtol=2e-2, atol=2e-5), at
    chosen = np.asarray(one.fields["chosen"] != 0) & np.asarray(one.mask)
    sign = np.sign(np.asarray(values[0][1]))
    assert np.all(sign[chosen] == -1), "the chosen gets more likely"
    if name != "ipo":
        assert np.all(sign[np.asarray(one.mask) & ~chosen] == 1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_absurd_log_probs_give_finite_values_and_gradients(name, shift):
    tokens = random_pairs()
    tokens = dataclasses.replace(tokens, reference=tokens.reference * shift, logprobs=tokens.logprobs * 1e3)
    value, grad = jax.value_and_grad(lambda lp: mean_over_pairs(LOSSES[name], dataclasses.replace(
        tokens, logprobs=lp)))(tokens.logprobs)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "kto"])
def test_half_a_pair_and_no_pair_are_worth_nothing(name):
    tokens = random_pairs(rows=[3, 1])
    gone = tokens.mask & ~((tokens.fields["pair_ids"] == 1) & (tokens.fields["chosen"] == 0))
    alone = dataclasses.replace(tokens, mask=gone)
    fn = lambda lp: jnp.sum(LOSSES[name](dataclasses.replace(alone, logprobs=lp)))
    value, grad = jax.value_and_grad(fn)(tokens.logprobs)
    of_first = (np.asarray(tokens.fields["pair_ids"]) == 1) & (np.arange(2)[:, None] == 0)
    assert np.all(np.asarray(grad)[of_first] == 0) and np.isfinite(value) and np.any(np.asarray(grad))
    unpaired = dataclasses.replace(tokens, fields=dict(tokens.fields) | {
        "pair_ids": jnp.zeros_like(tokens.fields["pair_ids"])})
    assert np.all(np.asarray(LOSSES[name](unpaired)) == 0)


def test_measures():
    tokens = pairs_of(([-1.0], [-2.0, -2.0]), ([-3.0], [-1.0]), reference=-1.0, rows=[2])
    np.testing.assert_allclose(preference_margin(tokens), [[2, 2, 2, -2, -2]])
    np.testing.assert_array_equal(preference_accuracy(tokens), [[1, 1, 1, 0, 0]])
    free = dataclasses.replace(tokens, reference=None)
    np.testing.assert_allclose(preference_margin(free), [[1, 1, 1, -2, -2]])


@pytest.mark.parametrize("bad", [
    lambda t: dpo(t, label_smoothing=0.5), lambda t: dpo(t, divergence="chi"),
    lambda t: dpo(t, divergence="alpha", alpha=1.0), lambda t: dpo(dataclasses.replace(t, reference=None)),
    lambda t: simpo(dataclasses.replace(t, fields={}))])
def test_errors_say_what_was_expected(bad):
    with pytest.raises(ValueError, match=r"in \[0, 0\.5\)|expected|give the term a target|the batch has"):
        bad(random_pairs())
