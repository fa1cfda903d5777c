"""A temperature on a top-k target: what is exact, what is bounded, and that the bound holds for whole distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.losses.rows.divergences import forward_kl, generalized_jsd, reverse_kl, skew_forward_kl
from distill_jax.losses.rows.outcomes import outcomes
from distill_jax.losses.rows.tempering import tail_bounds
from distill_jax.losses.targets import Full, TopKTarget

V, K = 17, 4
RULES = ("student", "even", "packed")


@jax.jit
def all_rules(z, target, temperature):
    return {rule: outcomes(z, target, temperature, rule) for rule in RULES}


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def lumped(p, ids):
    """[K+1] of one row: the kept ids and the sum of the others."""
    return np.append(p[ids], np.delete(p, ids).sum())


def topk_of(p):
    ids = np.argsort(-p, -1)[:, :K].astype(np.int32)
    return TopKTarget(jnp.asarray(ids), jnp.log(jnp.asarray(np.take_along_axis(p, ids, -1), jnp.float32)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.05, 8), st.floats(0.2, 8))
def test_bounds_hold_for_whole_distributions(seed, spread, tau):
    """And so does the factor by which every tempered kept probability may be off, whatever the rule."""
    rng = np.random.default_rng(seed)
    z, p = rng.normal(size=(3, V)) * 2, softmax(rng.normal(size=(3, V)) * spread)
    target = topk_of(p)
    ids = np.asarray(target.ids)
    got = all_rules(jnp.asarray(z, jnp.float32), target, jnp.float32(tau))
    for n in range(3):
        tail = np.delete(p[n], ids[n])
        mass, top = max(1e-7, 1 - p[n][ids[n]].sum()), p[n][ids[n]].min()
        even, packed = tail_bounds(np.float32(np.log(mass)), np.float32(np.log(min(top, mass))), np.array(V - K), tau)
        low, high = sorted((float(even), float(packed)))
        true = (tail ** (1 / tau)).sum()
        if tail.sum() > 1e-6:  # below, float32 no longer knows the mass
            assert np.exp(low) * (1 - 1e-4) <= true <= np.exp(high) * (1 + 1e-4)
        kept = (p[n][ids[n]] ** (1 / tau)).sum()
        factor = (kept + max(np.exp(high), true)) / (kept + min(np.exp(low), true))
        want, student = lumped(softmax(np.log(p[n]) / tau), ids[n]), lumped(softmax(z[n] / tau), ids[n])
        for rule in RULES:
            log_q, log_p = (np.asarray(x[n], np.float64) for x in got[rule])
            np.testing.assert_allclose(np.exp(log_q), student, rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-5)
            np.testing.assert_allclose(log_p[:K] - log_p[0], np.log(p[n][ids[n]] / p[n][ids[n][0]]) / tau, atol=1e-3)
            ratio = np.exp(log_p[:K]) / want[:K]
            assert np.all(ratio <= factor * (1 + 1e-3)) and np.all(ratio >= (1 - 1e-3) / factor), rule


def test_even_and_packed_tails_are_exact_where_they_are_true():
    """Tails (.1, .1) and (.2, 0): forward KL at tau = 2 equals that of the whole distributions, lumped."""
    z = jnp.array([[0.3, -0.2, 0.5, 1.0]])
    for rule, p in (("even", [0.5, 0.3, 0.1, 0.1]), ("packed", [0.6, 0.2, 0.2, 0.0])):
        p = np.array(p)
        target = TopKTarget(jnp.array([[0, 1]]), jnp.log(jnp.asarray(p[None, :2], jnp.float32)))
        a, b = (lumped(x, [0, 1]) for x in (p**0.5 / (p**0.5).sum(), softmax(np.asarray(z[0]) / 2)))
        got = forward_kl(z, target, temperature=2.0, temper=rule)
        np.testing.assert_allclose(got, [4 * (a * np.log(a / b)).sum()], rtol=1e-5)


def test_the_student_rule_is_zero_at_the_teacher():
    """Value and gradient at every temperature; "even" is not, which is why "student" is the one to train with."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)) * 2, jnp.float32)
    target = topk_of(softmax(z))

    @jax.jit
    def grads(temperature):
        return {(f.__name__, rule): jax.value_and_grad(
            lambda z, f=f, rule=rule: f(z, target, temperature=temperature, temper=rule).sum())(z)
            for f in (forward_kl, reverse_kl, generalized_jsd, skew_forward_kl) for rule in ("student", "even")}

    for tau in (0.5, 1.0, 4.0):
        for (name, rule), (value, grad) in grads(jnp.float32(tau)).items():
            if rule == "student" or tau == 1.0:
                assert abs(value) < 1e-4 and np.abs(grad).max() < 1e-4, (name, tau)
            else:
                assert np.abs(grad).max() > 1e-3, (name, tau)


def test_temperature_one_is_the_tail_bucket():
    rng = np.random.default_rng(1)
    z, target = jnp.asarray(rng.normal(size=(3, V)), jnp.float32), topk_of(softmax(rng.normal(size=(3, V))))
    want = outcomes(z, target)
    for rule, got in all_rules(z, target, jnp.float32(1)).items():
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=rule)


def test_one_kept_id_need_not_be_the_most_probable():
    """A `token` signal: the tail may hold a token of more probability than the kept one."""
    z = jnp.log(jnp.array([[0.1, 0.8, 0.1]]))
    target = TopKTarget(jnp.array([[0]]), jnp.log(jnp.array([[0.1]])))
    np.testing.assert_allclose(forward_kl(z, target, temperature=0.5, temper="student"), 0, atol=1e-6)


def test_what_cannot_be_tempered_is_refused():
    z, top = jnp.zeros((1, 3)), TopKTarget(jnp.array([[0]]), jnp.log(jnp.array([[0.5]])))
    with pytest.raises(ValueError, match="temper='student'"):
        forward_kl(z, top, temperature=2.0)
    with pytest.raises(ValueError, match=r"positive, got 0"):
        reverse_kl(z, Full(z), temperature=0)
    with pytest.raises(ValueError, match="expected one of"):
        forward_kl(z, top, temperature=2.0, temper="guess")  # type: ignore[arg-type]
