"""Policy losses, KL and aggregation: hand values of the method cards, NumPy, gradients, packing, extremes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.tokens.aggregate import ConstantLength, MeanOver, sequence_mean, token_mean
from distill_jax.losses.tokens.measures import clip_fraction, corrected_fraction, logprob_gap, mean_ratio
from distill_jax.losses.tokens.policy import cispo, gspo, gspo_token, ppo_clip, reinforce
from distill_jax.losses.tokens.ratios import Corrected, ratio, sampler_weights
from distill_jax.losses.tokens.regularizers import kl, negative_entropy, negative_log_likelihood
from tests.losses.sampled import aggregated, tokens_of


def value_and_grad(loss, tokens, per=None):
    """Value [B,T] (or aggregated) and the gradient of its sum (or aggregate) to the log-probs."""
    def total(logprobs):
        values = loss(dataclasses.replace(tokens, logprobs=logprobs))
        return (jnp.sum(values) if per is None else aggregated(values, tokens, per)), values

    (whole, values), grad = jax.value_and_grad(total, has_aux=True)(tokens.logprobs)
    return (values if per is None else whole), grad


def one(log_ratio, advantage, loss):
    """(value, gradient) at one token whose log ratio to the sampler is given."""
    tokens = tokens_of([[[-1.0]]], behaviour_logprobs=-1.0 - log_ratio, advantages=advantage)
    value, grad = value_and_grad(loss, tokens)
    return float(value[0, 0]), float(grad[0, 0])


@pytest.mark.parametrize("r,a,value,grad", [
    (1.3, 1, -1.28, 0), (0.7, 1, -0.7, -0.7), (0.7, -1, 0.8, 0), (1.1, -1, 1.1, 1.1), (9.0, -1, 9.0, 9.0)])
def test_dapo_hand_values(r, a, value, grad):
    got = one(np.log(r), a, lambda t: ppo_clip(t, low=0.2, high=0.28))
    np.testing.assert_allclose(got, (value, grad), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("r,a,value,grad", [(9.0, -1, 3.0, 0), (2.0, -1, 2.0, 2.0), (9.0, 1, -1.2, 0)])
def test_dual_clip_is_the_two_sided_clip(r, a, value, grad):
    """min(r, 3) inside the minimum (two-sided), or max(min(rA, clip A), 3A) for A < 0 (dual clip)."""
    got = one(np.log(r), a, lambda t: ppo_clip(t, dual=3.0))
    np.testing.assert_allclose(got, (value, grad), rtol=1e-5, atol=1e-7)
    surrogate = min(r * a, np.clip(r, 0.8, 1.2) * a)
    assert np.isclose(got[0], -(max(surrogate, 3 * a) if a < 0 else surrogate), rtol=1e-5)


def test_gspo_hand_values():
    """Card: log ratios .1, -.1, .3 -> s = e^.1 for all tokens, ds/dlp_t = s / 3."""
    lp, change = [-1.0, -2.0, -0.5], [0.1, -0.1, 0.3]
    tokens = tokens_of([[lp]], behaviour_logprobs=[[list(np.subtract(lp, change))]], advantages=1.0)
    np.testing.assert_allclose(ratio(tokens, level="sequence"), np.full((1, 3), 1.10517), rtol=1e-5)
    wide = {"low": 0.2, "high": 0.2}
    value, grad = value_and_grad(lambda t: gspo(t, **wide), tokens, sequence_mean)
    assert np.isclose(value, -1.10517, rtol=1e-5)
    np.testing.assert_allclose(grad, np.full((1, 3), -1.10517 / 3), rtol=1e-5)
    same = value_and_grad(lambda t: gspo_token(t, **wide), tokens, sequence_mean)
    np.testing.assert_allclose(same[0], value, rtol=1e-6)
    np.testing.assert_allclose(same[1], grad, rtol=1e-5)
    assert np.all(value_and_grad(gspo, tokens)[1] == 0), "4e-4 above 1 is clipped"
    np.testing.assert_allclose(ratio(tokens, level="product"), np.full((1, 3), np.exp(0.3)), rtol=1e-5)


def test_cispo_hand_values():
    np.testing.assert_allclose(one(np.log(7), 2, cispo), (10.0, -10.0), rtol=1e-5)  # -5 * 2 * log-prob -1
    np.testing.assert_allclose(one(np.log(0.5), 2, cispo), (1.0, -1.0), rtol=1e-5)
    np.testing.assert_allclose(one(np.log(0.5), 2, lambda t: cispo(t, floor=0.8))[1], -1.6, rtol=1e-5)
    assert one(np.log(7), 2, ppo_clip)[1] == 0


def test_adaptthink_hand_value():
    """One ratio a sequence, exp(mean lp - mean old), clipped at .8 and 1.2."""
    tokens = tokens_of([[[-1.0, -2.0]]], behaviour_logprobs=[[[float(np.log(0.5)), -2.5]]], advantages=0.3)
    r = np.exp((-1.0 - np.log(0.5) + 0.5) / 2)
    value, _ = value_and_grad(lambda t: ppo_clip(t, level="sequence"), tokens, sequence_mean)
    assert np.isclose(value, -0.3 * r, rtol=1e-5) and 0.8 < r < 1.2


def test_aggregation_hand_values():
    """Card of DAPO: lengths 2 and 4, A = +1, -1, ratio 1."""
    rows = [[[-1.0] * 2, [-1.0] * 4]]
    tokens = tokens_of(rows, behaviour_logprobs=-1.0, advantages=[[[1] * 2, [-1] * 4]], group_ids=1.0)
    values = ppo_clip(tokens)
    for per, want in ((sequence_mean, 0.0), (token_mean, 1 / 3), (ConstantLength(length=8), 0.125),
                      (ConstantLength(), 1.0), (MeanOver(field="group_ids"), 1 / 3)):
        assert np.isclose(aggregated(values, tokens, per), want, atol=1e-6), per


def test_trace_mean_hand_value():
    """Card of Delethink: a trace in chunks of 3 and 1, another of 4, A = +1, -1 -> 0; chunks alone would give -1/3."""
    rows = [[[-1.0] * 3], [[-1.0], [-1.0] * 4]]
    tokens = tokens_of(rows, behaviour_logprobs=-1.0, advantages=[[[1] * 3], [[1], [-1] * 4]],
                       trace_ids=[[[1] * 3], [[1], [2] * 4]])
    values = ppo_clip(tokens)
    assert np.isclose(aggregated(values, tokens, MeanOver(field="trace_ids")), 0.0, atol=1e-6)
    assert np.isclose(aggregated(values, tokens, sequence_mean), -1 / 3, atol=1e-6)
    grad = jax.grad(lambda v: aggregated(v, tokens, MeanOver(field="trace_ids")))(values)
    np.testing.assert_allclose(np.asarray(grad)[np.asarray(tokens.mask)], 1 / 8, rtol=1e-6)


def test_likelihood_of_own_correct_samples():
    """Card of PDR: rewards 1, 0, 1, mean log-probs -1, -2, -.5 -> .75 over the correct ones; none correct -> 0."""
    rows = [[[-1.5, -0.5], [-2.0], [-0.5]]]
    correct = tokens_of(rows, mask=[[[1, 1], [0], [1]]])
    assert np.isclose(aggregated(negative_log_likelihood(correct), correct, sequence_mean), 0.75)
    none = tokens_of(rows, mask=0.0)
    assert np.all(np.asarray(negative_log_likelihood(none)) == 0)


def test_doubling_a_response_doubles_its_gradient_weight_in_dr_grpo_only():
    def weight(length, per):
        tokens = tokens_of([[[-1.0] * length, [-1.0] * 3]], behaviour_logprobs=-1.0, advantages=1.0)
        grad = jax.grad(lambda v: aggregated(v, tokens, per))(tokens.logprobs)
        return float(jnp.sum(jnp.where(tokens.segment_ids == 1, grad, 0.0)))

    assert np.isclose(weight(4, ConstantLength(length=9)), 2 * weight(2, ConstantLength(length=9)))
    assert np.isclose(weight(4, sequence_mean), weight(2, sequence_mean))


def random_tokens(seed=0, gap=0.3, **fields):
    rng = np.random.default_rng(seed)
    rows = [[[float(x) for x in -rng.exponential(size=n)] for n in lengths] for lengths in ((3, 4), (5,), (1, 2, 4))]
    like = lambda f: [[[float(f(x)) for x in s] for s in row] for row in rows]
    made = {"behaviour_logprobs": like(lambda x: x + gap * rng.normal()),
            "old_logprobs": like(lambda x: x + gap * rng.normal()), "advantages": like(lambda x: rng.normal())}
    return tokens_of(rows, reference=like(lambda x: x + rng.normal()), mask=like(lambda x: rng.random() < 0.8),
                     entropies=like(lambda x: -x), **made | fields)


@pytest.mark.parametrize("old", ["current", "behaviour_logprobs"])
@pytest.mark.parametrize("loss", [ppo_clip, gspo_token, cispo, gspo])
def test_first_on_policy_step_is_reinforce(loss, old):
    """Ratio exactly 1, gradient exactly that of -A log pi (to the bit; gspo spreads one A over its sequence)."""
    tokens = random_tokens()
    ones = tokens_of([[[1.0] * 3, [1.0] * 4], [[1.0] * 5], [[1.0], [1.0] * 2, [1.0] * 4]]).logprobs
    fields = dict(tokens.fields) | {"behaviour_logprobs": tokens.logprobs}
    if loss is gspo:
        fields["advantages"] = ones * 1.7
    tokens = dataclasses.replace(tokens, fields=fields)
    for level in ("token", "sequence", "sequence_token", "product"):
        assert np.all(np.asarray(ratio(tokens, old, level)) == 1)
    value, grad = value_and_grad(lambda t: loss(t, old=old), tokens, sequence_mean)
    want, want_grad = value_and_grad(reinforce, tokens, sequence_mean)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-6, atol=1e-9)
    assert np.any(np.asarray(grad)) and np.all(np.asarray(clip_fraction(tokens, old=old)) == 0)
    if loss is cispo:
        assert value == want


LOSSES = {
    "ppo": lambda t: ppo_clip(t, dual=3.0), "gspo": lambda t: gspo(t, low=0.1, high=0.1), "cispo": cispo,
    "gspo_token": lambda t: gspo_token(t, low=0.1, high=0.1), "product": lambda t: ppo_clip(t, level="product"),
    "reinforce": reinforce, "corrected": Corrected(loss=ppo_clip, cap=1.2),
    "masked": Corrected(loss=cispo, mode="mask", cap=1.5, floor=0.5, level="product"),
    "k1": lambda t: kl(t, estimator="k1"), "k2": lambda t: kl(t, estimator="k2"),
    "k3": lambda t: kl(t, old="old_logprobs"), "entropy": negative_entropy,
}


def by_numpy(name, lp, b, o, ref, h, a):
    """One segment, its masked tokens only, in float64."""
    r, ro, g, d = np.exp(lp - b), np.exp(lp - o), np.exp(np.mean(lp - b)), lp - ref
    clip = lambda x, low, high: np.minimum(x * a, np.clip(x, low, high) * a)
    w = np.exp(np.sum(o - b))
    return np.broadcast_to({
        "ppo": -np.where(a < 0, np.maximum(clip(r, .8, 1.2), 3 * a), clip(r, .8, 1.2)), "gspo": -clip(g, .9, 1.1),
        "gspo_token": -clip(g, .9, 1.1), "product": -clip(np.exp(np.sum(lp - b)), .8, 1.2),
        "cispo": -np.minimum(r, 5) * a * lp, "reinforce": -a * lp,
        "corrected": -np.minimum(np.exp(o - b), 1.2) * clip(ro, .8, 1.2),
        "masked": -(w if .5 <= w <= 1.5 else 0) * np.minimum(ro, 5) * a * lp,
        "k1": d, "k2": d ** 2 / 2, "k3": ro * (np.exp(-d) + d - 1), "entropy": -h}[name], lp.shape)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_numpy_segment_by_segment(name):
    tokens = random_tokens(seed=3)
    values = np.asarray(LOSSES[name](tokens))
    arrays = [np.asarray(x, np.float64) for x in (
        tokens.logprobs, tokens.fields["behaviour_logprobs"], tokens.fields["old_logprobs"], tokens.reference,
        tokens.entropies, tokens.fields["advantages"])]
    ids, mask, seen = np.asarray(tokens.segment_ids), np.asarray(tokens.mask), 0
    for r in range(ids.shape[0]):
        for s in range(1, ids[r].max() + 1):
            here = mask[r] & (ids[r] == s)
            if here.any():
                np.testing.assert_allclose(values[r, here], by_numpy(name, *(x[r, here] for x in arrays)), rtol=2e-5,
                                           atol=1e-6)
                seen += 1
    assert seen >= 5 and np.all(values[~mask] == 0)


@pytest.mark.parametrize("name", LOSSES)
def test_packing_neighbours_and_what_is_masked_change_nothing(name):
    """Each segment alone in a row gives what it gives beside others, value and gradient; masked inputs are unread."""
    tokens = random_tokens(seed=5)
    value, grad = (np.asarray(x) for x in value_and_grad(LOSSES[name], tokens))
    ids, rows = np.asarray(tokens.segment_ids), []
    for r in range(ids.shape[0]):
        for s in range(1, ids[r].max() + 1):
            rows.append((r, np.flatnonzero(ids[r] == s)))
    junk = 7.0
    def alone(x):
        out = np.full((len(rows), ids.shape[1] + 2), junk if x.dtype != np.bool_ else False, x.dtype)
        for i, (r, at) in enumerate(rows):
            out[i, :len(at)] = np.where(np.asarray(tokens.mask)[r, at], x[r, at], junk) if x.dtype != np.bool_ else \
                x[r, at]
        return jnp.asarray(out)

    other = jax.tree.map(lambda x: alone(np.asarray(x)), tokens)
    other = dataclasses.replace(other, segment_ids=jnp.asarray(np.asarray(alone(np.minimum(ids, 1))) == 1, jnp.int32))
    got, got_grad = (np.asarray(x) for x in value_and_grad(LOSSES[name], other))
    for i, (r, at) in enumerate(rows):
        np.testing.assert_allclose(got[i, :len(at)], value[r, at], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got_grad[i, :len(at)], grad[r, at], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "entropy"])
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_absurd_log_probs_give_finite_values_and_gradients(name, gap):
    tokens = tokens_of([[[-1e4, -1.0]]], behaviour_logprobs=gap, old_logprobs=-gap, advantages=-1.0, reference=gap)
    value, grad = value_and_grad(LOSSES[name], tokens)
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(grad))


def test_k3_hand_values():
    tokens = tokens_of([[[-1.0, -1.0, -1.0]]], reference=[[[-1.2, -0.8, -1.0]]])
    np.testing.assert_allclose(kl(tokens), [[0.01873, 0.02140, 0.0]], atol=5e-6)
    with pytest.raises(ValueError, match="give the term a target"):
        kl(dataclasses.replace(tokens, reference=None))


@pytest.mark.parametrize("estimator,old,of", [
    ("k1", "", "zero"), ("k2", "", "reverse"), ("k3", "", "forward"), ("k1", "current", "reverse"),
    ("k3", "current", "reverse")])
def test_expected_gradients_of_kl_estimators(estimator, old, of):
    """All outcomes of one step as tokens, each weighed by its probability."""
    rng = np.random.default_rng(0)
    z, ref = jnp.asarray(rng.normal(size=6), jnp.float32), jax.nn.log_softmax(jnp.asarray(rng.normal(size=6)))
    ref = ref.astype(jnp.float32)
    base = tokens_of([[[0.0] * 6]])

    def loss(z):
        log = jax.nn.log_softmax(z)
        tokens = dataclasses.replace(base, logprobs=log[None], reference=ref[None])
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(log)) * kl(tokens, estimator=estimator, old=old)[0])

    exact = {"zero": lambda z: 0.0 * jnp.sum(z),
             "reverse": lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - ref)),
             "forward": lambda z: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(z)))}
    np.testing.assert_allclose(jax.grad(loss)(z), jax.grad(exact[of])(z), atol=2e-6)
    if estimator != "k2":
        assert np.isclose(loss(z), exact["reverse"](z), rtol=1e-4)


def test_policy_mask_takes_the_policy_gradient_only():
    """Cards of AdaCoT (decision token) and RAIF (a whole sample): exactly 0 there, unchanged elsewhere, KL stays."""
    tokens = random_tokens(seed=1)
    kept = jnp.ones_like(tokens.logprobs).at[0, 0].set(0).at[1].set(0)
    masked = dataclasses.replace(tokens, fields=dict(tokens.fields) | {"policy_mask": kept})
    for loss in (ppo_clip, cispo, reinforce):
        grad, (v, g) = value_and_grad(loss, tokens)[1], value_and_grad(loss, masked)
        assert np.all(np.asarray(g)[np.asarray(kept) == 0] == 0) and np.all(np.asarray(v)[np.asarray(kept) == 0] == 0)
        np.testing.assert_array_equal(np.asarray(g)[np.asarray(kept) == 1], np.asarray(grad)[np.asarray(kept) == 1])
        assert aggregated(v, masked, token_mean) != 0
    np.testing.assert_array_equal(kl(masked), kl(tokens))


def test_sampler_weights():
    tokens = tokens_of([[[-1.0, -1.0, -1.0]]], old_logprobs=[[[-1.0, -1.0, -1.0]]],
                       behaviour_logprobs=[[[-1.0 - float(np.log(x)) for x in (0.5, 1.5, 8.0)]]], advantages=1.0)
    weights = lambda **kw: np.asarray(sampler_weights(tokens, old="old_logprobs", **kw))[0]
    np.testing.assert_allclose(weights(), [0.5, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(weights(mode="mask", cap=4.0, floor=0.6), [0, 1.5, 0], rtol=1e-6)
    np.testing.assert_allclose(weights(level="product", cap=9.0), [6.0] * 3, rtol=1e-5)
    np.testing.assert_allclose(sampler_weights(tokens, old="current")[0], [0.5, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(corrected_fraction(tokens)[0], [0, 0, 1])
    np.testing.assert_allclose(logprob_gap(tokens)[0], np.abs(np.log([0.5, 1.5, 8])), rtol=1e-5)
    np.testing.assert_allclose(mean_ratio(tokens)[0], [0.5, 1.5, 8], rtol=1e-5)
    np.testing.assert_array_equal(clip_fraction(tokens)[0], [0, 1, 1])


@pytest.mark.parametrize("bad", [
    lambda t: ppo_clip(t, low=1.5), lambda t: ppo_clip(t, dual=1.1), lambda t: ppo_clip(t, level="row"),
    lambda t: ppo_clip(t, old="old"), lambda t: cispo(t, cap=0.0), lambda t: kl(t, estimator="k4"),
    lambda t: Corrected(loss=ppo_clip, old="behaviour_logprobs")(t), lambda t: Corrected(loss=ppo_clip, mode="cut")(t),
    lambda t: ConstantLength(length=0), lambda t: aggregated(t.logprobs, t, MeanOver(field="trace_ids"))])
def test_errors_say_what_was_expected(bad):
    with pytest.raises(ValueError, match=r"expected|needs|bounds|keeps|nothing|no gap|at least"):
        bad(random_tokens())
