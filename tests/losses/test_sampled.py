"""Random-sampling KD: outcomes drawn from the teacher stand for its distribution, for what is linear in it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.rows.adaptive import adaptive_kl
from distill_jax.losses.rows.alpha_beta import alpha_beta
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from distill_jax.losses.rows.plackett_luce import plackett_luce
from distill_jax.losses.rows.taid import taid
from distill_jax.losses.targets import Full, SampledTarget

Q, P = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.3, 0.1])
Z = jnp.log(jnp.asarray(Q, jnp.float32))


@jax.jit
def value_and_grad(z, target):
    """{name: (values [N], gradient of their sum [N,V])}."""
    total = lambda f: lambda z: (f(z, target).sum(), f(z, target))
    out = {f.__name__: jax.grad(total(f), has_aux=True)(z) for f in (cross_entropy, forward_kl)}
    return {n: (value, grad) for n, (grad, value) in out.items()}


def test_hand_value():
    """Draws 0, 0, 0, 2: w = (.75, .25). Padding, an id beyond V, and an id that is not real count for nothing."""
    ids = jnp.array([[0, 2, -1], [0, 2, 7], [0, 2, 3]])
    weights = jnp.array([[0.75, 0.25, 0.0], [0.75, 0.25, 0.1], [0.75, 0.25, 0.1]])
    z = jnp.tile(jnp.append(Z, -1e30), (3, 1))
    got = value_and_grad(z, SampledTarget(ids, weights))
    ce = -0.75 * np.log(0.2) - 0.25 * np.log(0.3)
    np.testing.assert_allclose(got["cross_entropy"][0], [ce] * 3, rtol=1e-6)
    np.testing.assert_allclose(got["forward_kl"][0], [ce + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)] * 3, rtol=1e-5)
    for _, grad in got.values():
        np.testing.assert_allclose(grad, [[0.2 - 0.75, 0.5, 0.3 - 0.25, 0]] * 3, atol=1e-6)


def test_unbiased_over_all_draws():
    """Every outcome of three draws from three tokens, weighed by its probability: exact expectations."""
    draws = list(itertools.product(range(3), repeat=3))
    chance = np.array([P[list(d)].prod() for d in draws])
    shares = np.array([[d.count(v) / 3 for v in range(3)] for d in draws])
    target = SampledTarget(jnp.asarray(np.where(shares > 0, np.arange(3), -1), jnp.int32),
                           jnp.asarray(shares, jnp.float32))
    got = value_and_grad(jnp.tile(Z, (len(draws), 1)), target)
    mean = lambda x: (chance.reshape(-1, *[1] * (np.ndim(x) - 1)) * np.asarray(x, np.float64)).sum(0)
    full = jax.grad(lambda z: forward_kl(z[None], Full(jnp.log(jnp.asarray(P, jnp.float32))[None]))[0])(Z)
    np.testing.assert_allclose(mean(got["cross_entropy"][0]), -(P * np.log(Q)).sum(), rtol=1e-5)
    for _, grad in got.values():
        np.testing.assert_allclose(mean(grad), full, atol=1e-6)
    missing = -(P * np.log(P)).sum() - mean(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1))
    assert missing > 0.1, "the entropy of three draws is less than the teacher's"
    np.testing.assert_allclose(mean(got["forward_kl"][0]), (P * np.log(P / Q)).sum() + missing, rtol=1e-5)


def test_other_losses_say_what_to_use():
    target = SampledTarget(jnp.array([[0]]), jnp.array([[1.0]]))
    losses = (reverse_kl, generalized_jsd, skew_forward_kl, skew_reverse_kl, total_variation, alpha_beta, adaptive_kl,
              plackett_luce, lambda z, t: taid(z, t, t=jnp.float32(0.5)),
              lambda z, t: forward_kl(z, t, temperature=2.0))
    for loss in losses:
        with pytest.raises(ValueError, match="cross_entropy or forward_kl"):
            loss(Z[None], target)


def test_huge_logits_and_nothing_drawn():
    z = jnp.array([[1e4, -1e4, 0.0], [0.0, 1.0, 2.0]], jnp.bfloat16).astype(jnp.float32)
    target = SampledTarget(jnp.array([[1, 2], [-1, -1]]), jnp.array([[0.5, 0.5], [0.0, 0.0]]))
    for value, grad in value_and_grad(z, target).values():
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(grad))
        assert value[1] == 0 and not np.any(grad[1])
        np.testing.assert_allclose(grad[0], [1, -0.5, -0.5], atol=1e-6)
