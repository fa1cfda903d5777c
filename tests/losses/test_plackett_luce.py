"""PLD: the card's hand values, a NumPy reference on whole and top-k teachers, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from distill_jax.core.head import NEG
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.plackett_luce import plackett_luce
from distill_jax.losses.targets import Full, Labels, TopKTarget

Z_S = jnp.array([[0.0, 1, 2]])
value_and_grad = jax.jit(lambda z, t: (plackett_luce(z, t), jax.grad(lambda z: plackett_luce(z, t).sum())(z)))


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z))
    return e / e.sum()


def reference(scores, weights, order):
    """sum_k w [log sum of what is still there - score], over one row."""
    s, w = np.asarray(scores, np.float64)[order], np.asarray(weights, np.float64)[order]
    return sum(w[k] * (np.log(np.exp(s[k:]).sum()) - s[k]) for k in range(len(s)))


def full_reference(z, t, y):
    order = [y] + [v for v in np.argsort(-np.asarray(t), kind="stable") if v != y]
    return reference(z, softmax(t), order)


def test_hand_values():
    """The card's: z_T = (2,1,0), z_S = (0,1,2)."""
    at = lambda z, t, y: plackett_luce(jnp.asarray([z], jnp.float32), Full(jnp.asarray([t], jnp.float32),
                                                                          jnp.array([y])))[0]
    np.testing.assert_allclose(at([0, 1, 2], [2, 1, 0], 0), 1.923031, atol=2e-6)
    np.testing.assert_allclose(at([0, 1, 2], [2, 1, 0], 1), 1.759401, atol=2e-6)
    np.testing.assert_allclose(at([2, 1, 0], [2, 1, 0], 0), 0.347820, atol=2e-6)
    np.testing.assert_allclose(at([0, 1, 2], [200, 1, 0], 0), 2.407606, atol=2e-6)
    np.testing.assert_allclose(at([0, 1, 2], [200, 1, 0], 0), cross_entropy(Z_S, Labels(jnp.array([0])))[0], rtol=1e-6)
    grad = value_and_grad(Z_S, Full(jnp.array([[2.0, 1, 0]]), jnp.array([0])))[1]
    np.testing.assert_allclose(grad, [[-0.605349, -0.016107, 0.621456]], atol=2e-6)


def test_numpy_reference_and_invariances():
    rng = np.random.default_rng(0)
    z, t = (rng.normal(size=(6, 9)).astype(np.float32) * 2 for _ in range(2))
    t[:, 3] = t[:, 5]  # a tie goes to the smaller id
    y = rng.integers(0, 9, 6)
    target = Full(jnp.asarray(t), jnp.asarray(y, jnp.int32))
    value, grad = value_and_grad(jnp.asarray(z), target)
    np.testing.assert_allclose(value, [full_reference(*row) for row in zip(z, t, y)], rtol=2e-5)
    shifted, same = value_and_grad(jnp.asarray(z) + 3.0, target)
    np.testing.assert_allclose(shifted, value, rtol=1e-5)
    np.testing.assert_allclose(same, grad, atol=1e-5)
    np.testing.assert_allclose(np.sum(grad, -1), 0, atol=1e-5)
    other = jnp.asarray(rng.normal(size=(6, 9)), jnp.float32)
    middle = value_and_grad((jnp.asarray(z) + other) / 2, target)[0]
    assert np.all(middle <= (value + value_and_grad(other, target)[0]) / 2 + 1e-5), "convex in the student's logits"


def topk_case():
    """Row 0: y is the second kept id; row 1: y is not kept; row 2: two slots are empty; row 3: no y among few."""
    rng = np.random.default_rng(3)
    z, t = (rng.normal(size=(4, 9)).astype(np.float32) * 2 for _ in range(2))
    logp = np.log(np.array([softmax(x) for x in t]))
    ids = np.argsort(-logp, -1)[:, :4].astype(np.int32)
    y = np.array([ids[0, 1], np.argsort(logp[1])[0], ids[2, 0], np.argsort(logp[3])[1]])
    kept = np.take_along_axis(logp, ids, -1)
    ids[2, 2:], kept[2, 2:] = -1, -np.inf
    target = TopKTarget(jnp.asarray(ids), jnp.asarray(kept, jnp.float32), None, jnp.asarray(y, jnp.int32))
    return z, t, y, ids, kept, target


def test_topk_puts_the_bucket_last_and_y_first():
    z, t, y, ids, kept, target = topk_case()
    value, _ = value_and_grad(jnp.asarray(z), target)
    for n in range(4):
        here = [i for i in ids[n] if i >= 0]
        p = dict(zip(ids[n], np.exp(kept[n])))
        rest = [v for v in range(9) if v not in here and v != y[n]]
        order = [y[n]] + [i for i in here if i != y[n]]
        weights = [p.get(i, min(1 - sum(p[j] for j in here), min(p[j] for j in here))) for i in order]
        scores = [z[n][i] for i in order] + [np.log(np.exp(z[n][rest].astype(np.float64)).sum())]
        np.testing.assert_allclose(value[n], reference(scores, [*weights, 0.0], np.arange(len(scores))), rtol=2e-5)
    assert value[0] <= full_reference(z[0], t[0], y[0]), "only terms within the tail are left out"
    falling = -np.sort(-np.log([softmax(x) for x in t]), -1)
    everything = TopKTarget(jnp.asarray(np.argsort(-t, -1), jnp.int32), jnp.asarray(falling, jnp.float32), None,
                            target.token)
    np.testing.assert_allclose(value_and_grad(jnp.asarray(z), everything)[0],
                               [full_reference(*row) for row in zip(z, t, y)], rtol=2e-5)


def test_gradient_against_finite_differences():
    z, t, *_, target = topk_case()
    loss = jax.jit(lambda z: [plackett_luce(z, target), plackett_luce(z, Full(jnp.asarray(t), target.token))])
    check_grads(loss, (jnp.asarray(z),), 1, modes=["rev"], rtol=2e-2, atol=2e-3, eps=1e-2)


def test_teacher_temperature_orders_alike_and_weighs_flatter():
    t = jnp.array([[2.0, 1, 0]])
    got = plackett_luce(Z_S, Full(t, jnp.array([0])), temperature=4.0)
    np.testing.assert_allclose(got, [reference(Z_S[0], softmax(np.array([0.5, 0.25, 0])), [0, 1, 2])], rtol=1e-5)


def test_padding_and_huge_logits_are_finite():
    z, t, *_, target = topk_case()
    pad = lambda x: jnp.pad(jnp.asarray(x), ((0, 0), (0, 2)), constant_values=NEG)
    for a, b in ((target, target), (Full(pad(t), target.token), Full(jnp.asarray(t), target.token))):
        (value, grad), (want, exact) = value_and_grad(pad(z), a), value_and_grad(jnp.asarray(z), b)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(grad, np.pad(exact, ((0, 0), (0, 2))), atol=1e-6)
        value, grad = value_and_grad((pad(z) * 1e4).astype(jnp.bfloat16).astype(jnp.float32).clip(NEG), a)
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(grad))


def test_it_needs_the_token():
    with pytest.raises(ValueError, match="no `token`"):
        plackett_luce(Z_S, Full(Z_S))
    with pytest.raises(ValueError, match="compares distributions"):
        plackett_luce(Z_S, Labels(jnp.array([0])))
