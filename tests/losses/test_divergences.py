"""Skew KLs, total variation, alpha-beta, AKL and truncated top-k: what sets each apart from plain KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.losses.rows.adaptive import adaptive_kl
from distill_jax.losses.rows.alpha_beta import alpha_beta
from distill_jax.losses.rows.divergences import (
    forward_kl,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from distill_jax.losses.rows.truncated import truncated_kl
from distill_jax.losses.targets import Full, TopKTarget

P, Q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
kl = lambda a, b: (a * np.log(a / b)).sum()
row = lambda p: jnp.log(jnp.asarray(p, jnp.float32))[None]
at = lambda loss, p=P, q=Q, **kw: float(loss(row(q), Full(row(p)), **kw)[0])


def test_skew_hand_values_and_ends():
    assert np.isclose(at(skew_forward_kl, alpha=0.1), kl(P, 0.1 * P + 0.9 * Q), rtol=1e-5)
    assert np.isclose(at(skew_reverse_kl, alpha=0.1), kl(Q, 0.9 * P + 0.1 * Q), rtol=1e-5)
    assert at(skew_forward_kl, alpha=0.0) == at(forward_kl) and at(skew_reverse_kl, alpha=0.0) == at(reverse_kl)
    for loss in (skew_forward_kl, skew_reverse_kl):
        scheduled = jax.jit(lambda a, f=loss: f(row(Q), Full(row(P)), alpha=a))
        np.testing.assert_allclose(scheduled(jnp.float32(0.3)), at(loss, alpha=0.3), rtol=1e-5)
        np.testing.assert_allclose(scheduled(jnp.float32(0.0)), at(loss, alpha=0.0), rtol=1e-5)
        apart = loss(jnp.array([[1e4, -1e4]]), Full(jnp.array([[-1e4, 1e4]])), alpha=0.1)
        np.testing.assert_allclose(apart, -np.log(0.1), rtol=1e-6, err_msg="bounded where KL is 2e4")
        with pytest.raises(ValueError, match="0 <= alpha < 1"):
            at(loss, alpha=1.0)


def test_total_variation_and_its_gradient():
    assert np.isclose(at(total_variation), 0.4)
    assert np.isclose(total_variation(jnp.array([[1e4, 0.0]]), Full(jnp.array([[0.0, 1e4]])))[0], 1.0)
    q = np.array([0.2, 0.35, 0.45])
    sign = np.sign(q - P)
    grad = jax.grad(lambda z: total_variation(z, Full(row(P)))[0])(row(q))[0]
    np.testing.assert_allclose(grad, 0.5 * q * (sign - (q * sign).sum()), atol=1e-6)


def test_alpha_beta_corners():
    assert np.isclose(at(alpha_beta, alpha=1.0, beta=0.0), kl(P, Q), rtol=1e-5)
    assert np.isclose(at(alpha_beta, alpha=0.0, beta=1.0), kl(Q, P), rtol=1e-5)
    assert np.isclose(at(alpha_beta, alpha=0.5, beta=0.5), 4 * (1 - np.sqrt(P * Q).sum()), rtol=1e-5)  # Hellinger
    assert np.isclose(at(alpha_beta, alpha=1.0, beta=1.0), ((P - Q) ** 2).sum() / 2, rtol=1e-5)
    for alpha, beta in ((0.2, 0.7), (0.7, 0.2), (0.0, 0.5), (1.3, 0.4)):
        swapped = at(alpha_beta, Q, P, alpha=beta, beta=alpha)
        assert np.isclose(at(alpha_beta, alpha=alpha, beta=beta), swapped, rtol=1e-5)


def test_alpha_beta_gradient_in_closed_form():
    """d/d log q = q^beta (q^alpha - p^alpha) / alpha: no cancellation where the value has one."""
    for alpha, beta in ((0.2, 0.7), (0.9, 0.01), (0.5, 0.0)):
        slope = Q**beta * (Q**alpha - P**alpha) / alpha
        grad = jax.grad(lambda z, a=alpha, b=beta: alpha_beta(z, Full(row(P)), alpha=a, beta=b)[0])(row(Q))[0]
        np.testing.assert_allclose(grad, slope - Q * slope.sum(), atol=2e-5)


def test_alpha_beta_is_continuous_where_the_published_code_jumps():
    """At alpha = 0 that code has 1/beta for 1/beta^2: half of the limit at beta = 1/2."""
    b = 0.5
    published = (Q**b * b * np.log(Q / P) - Q**b + P**b).sum() / b
    limit, near = at(alpha_beta, alpha=0.0, beta=b), at(alpha_beta, alpha=0.01, beta=b)
    assert np.isclose(limit, near, rtol=2e-2) and np.isclose(published, b * limit, rtol=1e-5)
    for alpha, beta in ((0.0, 0.0), (-0.5, 1.0), (1.0, 1e-4)):
        with pytest.raises(ValueError, match="exponents"):
            at(alpha_beta, alpha=alpha, beta=beta)


def test_adaptive_kl_by_hand():
    """P's head is its first token: gaps .4 and .4, so half of each KL."""
    assert np.isclose(at(adaptive_kl), 0.5 * kl(P, Q) + 0.5 * kl(Q, P), rtol=1e-5)
    assert np.isclose(at(adaptive_kl, mu=0.8), 0.5 * kl(P, Q) + 0.5 * kl(Q, P), rtol=1e-5)
    assert np.isclose(at(adaptive_kl, mu=1.0), kl(P, Q), rtol=1e-5), "all head"
    with pytest.raises(ValueError, match="0 < mu"):
        at(adaptive_kl, mu=0.0)


def test_adaptive_head_is_the_papers():
    """p = (.4,.3,.2,.1): the smallest set of half the mass has two tokens; the authors' code takes one."""
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.45, 0.25, 0.2])
    gap = abs(p - q)
    blend = lambda head: (gap[:head].sum() * kl(p, q) + gap[head:].sum() * kl(q, p)) / gap.sum()
    assert np.isclose(at(adaptive_kl, p, q), blend(2), rtol=1e-5) and not np.isclose(blend(1), blend(2), rtol=1e-3)
    rising = np.cumsum(p[::-1])[::-1]
    assert (rising <= 0.5).tolist() == [False, False, True, True], "DSKD's rule, from the other end, agrees"
    order = [2, 0, 3, 1]
    assert np.isclose(at(adaptive_kl, p[order], q[order]), blend(2), rtol=1e-5), "order of ids does not matter"
    kept = TopKTarget(jnp.array([[0]]), row([0.4]))
    p, q = np.array([0.4, 0.6]), np.array([0.25, 0.75])
    np.testing.assert_allclose(adaptive_kl(row([0.25, 0.45, 0.1, 0.2]), kept), [kl(p, q) / 2 + kl(q, p) / 2],
                               rtol=1e-5, err_msg="the bucket is tail even though the head lacks mass")


def test_truncated_kl_wants_the_student_too_sure():
    """Its minimum is p / sum(kept); at student = teacher it pushes the tail down. Forward KL with a bucket does not."""
    p = np.array([0.5, 0.25, 0.15, 0.1])
    target = TopKTarget(jnp.array([[0, 1, -1]]), jnp.append(row(p[:2]), -jnp.inf)[None])
    grad = lambda loss, q: np.asarray(jax.grad(lambda z: loss(z, target)[0])(row(q)))[0]
    np.testing.assert_allclose(truncated_kl(row(p), target), [-np.log(0.75)], rtol=1e-5)
    np.testing.assert_allclose(grad(truncated_kl, p), [0.5 - 2 / 3, 0.25 - 1 / 3, 0.15, 0.1], atol=1e-6)
    np.testing.assert_allclose(grad(forward_kl, p), 0, atol=1e-6)
    sure = np.array([2 / 3, 1 / 3, 1e-9, 1e-9])
    np.testing.assert_allclose(truncated_kl(row(sure), target), [0], atol=1e-6)
    assert np.abs(grad(truncated_kl, sure)).max() < 1e-6 and np.abs(grad(forward_kl, sure)).max() > 0.1
    with pytest.raises(ValueError, match="needs a top-k signal"):
        truncated_kl(row(p), Full(row(p)))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 1), st.floats(0.1, 5))
def test_taids_bucket_is_an_upper_bound(seed, t, spread):
    """What `taid` says of its tail: (sum q)^(1-t) (sum p)^t >= sum q^(1-t) p^t, with equality for equal shapes."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(9) / spread, size=2) + 1e-12
    lump = q.sum() ** (1 - t) * p.sum() ** t
    assert lump >= (q ** (1 - t) * p**t).sum() * (1 - 1e-9)
    assert np.isclose(((3 * p) ** (1 - t) * p**t).sum(), (3 * p.sum()) ** (1 - t) * p.sum() ** t)
