"""TGeo-KD's triangle and fused loss: values by hand, edges, gradients, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl, reverse_kl
from distill_jax.losses.rows.trilateral import FEATURES, Fused, fusion_ratio, parameters, ratio, triangle
from distill_jax.losses.targets import Full, Labels, SampledTarget, TopKTarget

RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.normal(size=(5, 12)).astype(np.float32))
T = jnp.asarray(2 * RNG.normal(size=(5, 12)).astype(np.float32))
Y = jnp.asarray(RNG.integers(0, 12, 5).astype(np.int32))


def topk(logits, token, k=4):
    logp, ids = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    return TopKTarget(ids, logp, None, token)


def constant(bias):
    """A network whose ratio is sigmoid(bias) everywhere (up to the limit of `STEEP`)."""
    return jnp.zeros(parameters(3)).at[-1].set(bias)


def test_triangle_by_hand():
    z, t = np.array([[0.0, 1.0, 2.0]]), np.array([[2.0, 0.0, -2.0]])
    q, p = (np.exp(x) / np.exp(x).sum() for x in (z, t))
    want = [-np.log(q[0, 2]), -np.log(p[0, 2]), (p * np.log(p / q)).sum(), -(q * np.log(q)).sum(),
            -(p * np.log(p)).sum()]
    got = triangle(jnp.asarray(z), Full(jnp.asarray(t), jnp.array([2], jnp.int32)))
    np.testing.assert_allclose(got[0], [*np.log1p(want), 0.0], rtol=1e-5)
    right = triangle(jnp.asarray(z), Full(jnp.asarray(t), jnp.array([0], jnp.int32)))
    assert right[0, -1] == 1.0


def test_all_vertices_the_same_has_no_sides():
    sure = jnp.full((1, 6), -40.0).at[0, 2].set(40.0)
    features = triangle(sure, Full(sure, jnp.array([2], jnp.int32)))
    np.testing.assert_allclose(features[0, :5], 0.0, atol=1e-6)


def test_kept_token_and_tail_token():
    """A kept token has its own probability, another one the tail's mass; what is kept whole is as if full."""
    whole, full = triangle(Z, topk(T, Y, k=12)), triangle(Z, Full(T, Y))
    np.testing.assert_allclose(whole, full, rtol=1e-4, atol=1e-5)
    kept = topk(T, Y, k=3)
    some = np.asarray(triangle(Z, kept))[:, FEATURES.index("teacher_nll")]
    logp = np.asarray(jax.nn.log_softmax(T))
    for n in range(5):
        inside = int(Y[n]) in np.asarray(kept.ids[n]).tolist()
        want = logp[n, int(Y[n])] if inside else np.log(1 - np.exp(np.asarray(kept.logprobs[n])).sum())
        np.testing.assert_allclose(np.expm1(some[n]), -want, rtol=1e-4)


@pytest.mark.parametrize("target", [Full(T, Y), topk(T, Y)], ids=["full", "topk"])
def test_ends_are_pure_kd_and_pure_cross_entropy(target):
    for bias, pure in ((50.0, forward_kl(Z, target)), (-50.0, cross_entropy(Z, Labels(Y)))):
        np.testing.assert_allclose(Fused()(Z, target, fusion=constant(bias)), pure, rtol=2e-2)
    np.testing.assert_allclose(Fused(kd=reverse_kl)(Z, target, fusion=jnp.zeros(parameters(3))),
                               0.5 * reverse_kl(Z, target) + 0.5 * cross_entropy(Z, Labels(Y)), rtol=1e-5)


def test_ratio_is_inside_and_carries_no_gradient():
    fusion = jnp.asarray(RNG.normal(size=parameters(8)).astype(np.float32)) * 30
    alpha = fusion_ratio(Z, Full(T, Y), fusion=fusion)
    assert np.all((alpha > 0.002) & (alpha < 0.998))
    got = jax.grad(lambda z: Fused()(z, Full(T, Y), fusion=fusion).sum())(Z)
    want = jax.grad(lambda z: (alpha * forward_kl(z, Full(T, Y)) + (1 - alpha) * cross_entropy(z, Labels(Y))).sum())(Z)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert np.any(np.asarray(jax.grad(lambda w: ratio(w, triangle(Z, Full(T, Y))).sum())(fusion)) != 0)


def test_large_logits_and_missing_outcomes_stay_finite():
    hot = Z.astype(jnp.bfloat16) * 1e4
    padded = TopKTarget(jnp.full((5, 3), -1, jnp.int32), jnp.full((5, 3), -jnp.inf), None, Y)
    for target in (topk(T * 1e3, Y), padded):
        value, grad = jax.value_and_grad(lambda z, t=target: Fused()(z, t, fusion=constant(0.3)).sum())(
            hot.astype(jnp.float32))
        assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_what_has_no_triangle_is_refused():
    with pytest.raises(ValueError, match="a topk signal, or a provider"):
        triangle(Z, SampledTarget(Y[:, None], jnp.ones((5, 1))))
    with pytest.raises(ValueError, match="the token that stands there"):
        triangle(Z, Full(T))
