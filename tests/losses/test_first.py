"""FIRST: KL over renormalised outcomes. Hand values of the method card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.first import renormalised_kl
from distill_jax.losses.targets import Full, TopKTarget
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_sum
from tests.objective.dense import dense_total, random_head, random_topk, rel

TEACHER = jnp.log(jnp.array([[0.6, 0.2, 0.1, 0.05, 0.03]]))
STUDENT = jnp.log(jnp.array([[0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02]]))
FIVE = jnp.arange(5)[None]


def reference(z, ids, logprobs, k, temperature=1.0):
    """NumPy: the k best present ids, both sides divided by their sums."""
    order = np.argsort(-logprobs, kind="stable")[:k]
    order = [i for i in order if ids[i] >= 0 and ids[i] < len(z) and np.isfinite(logprobs[i])]
    if not order:
        return 0.0
    t, s = np.exp(logprobs[order] / temperature), np.exp(z[ids[order]])
    t, s = t / t.sum(), s / s.sum()
    return float((t * np.log(t / s)).sum())


def test_hand_value_and_closed_form_gradient():
    target = TopKTarget(FIVE, TEACHER)
    assert np.isclose(renormalised_kl(STUDENT, target)[0], 0.0295327, atol=1e-6)
    grad = jax.grad(lambda z: renormalised_kl(z, target)[0])(STUDENT)[0]
    t, s = np.exp(TEACHER[0]), np.exp(STUDENT[0, :5])
    np.testing.assert_allclose(grad[:5], s / s.sum() - t / t.sum(), atol=1e-6)
    assert not grad[5:].any(), "mass outside the five is free: the point of the warning in the module"
    moved = STUDENT.at[0, 5:].add(9.0)
    assert np.isclose(renormalised_kl(moved, target)[0], 0.0295327, atol=1e-6) and forward_kl(moved, target)[0] > 1


def test_temperature_moves_the_teacher_alone():
    """The card's T = 2: (.400339, .231136, .163438, .115568, .089519)."""
    tempered = np.array([0.400339, 0.231136, 0.163438, 0.115568, 0.089519])
    same = TopKTarget(FIVE, jnp.log(jnp.asarray(tempered, jnp.float32))[None])
    got = renormalised_kl(STUDENT, TopKTarget(FIVE, TEACHER), temperature=2.0)
    np.testing.assert_allclose(got, renormalised_kl(STUDENT, same), atol=2e-6)
    assert np.isclose(renormalised_kl(jnp.pad(TEACHER / 2, ((0, 0), (0, 2))), TopKTarget(FIVE, TEACHER),
                                      temperature=2.0)[0], 0.0, atol=1e-6), "student = tempered teacher"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.sampled_from([2, 3, 6]), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_numpy_reference(seed, k, temperature):
    rng = np.random.default_rng(seed)
    signal = random_topk(rng, (4,), 13, 5, empty=0.4)
    z = rng.normal(size=(4, 11)).astype(np.float32) * 3  # two ids of the teacher are none of the student's
    got = renormalised_kl(jnp.asarray(z), TopKTarget(signal.ids, signal.logprobs), k=k, temperature=temperature)
    # an absent id among the k best leaves its place empty, as in the store
    want = [reference(z[i], np.asarray(signal.ids[i]), np.asarray(signal.logprobs[i], np.float64), k, temperature)
            for i in range(4)]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_extreme_logits_and_empty_rows():
    z = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], jnp.bfloat16).astype(jnp.float32)
    target = TopKTarget(jnp.array([[1, 0], [-1, -1]]), jnp.array([[-0.1, -3.0], [-jnp.inf, -jnp.inf]]))
    value, grad = jax.value_and_grad(lambda z: renormalised_kl(z, target).sum())(z)
    assert np.isfinite(value) and np.isfinite(grad).all() and not grad[1].any()


def test_lifted_equals_dense():
    rng = np.random.default_rng(0)
    hidden, head = jnp.asarray(rng.normal(size=(2, 9, 6)), jnp.float32), random_head(rng, 23, 6)
    tokens = jnp.asarray(rng.integers(0, 23, (2, 9)), jnp.int32)
    signals = {"topk": random_topk(rng, (2, 9), 23, 6)}
    terms = {"kl": RowTerm(loss=renormalised_kl, target="signals/topk", kwargs={"k": 3})}
    weights = {"kl": jnp.asarray(rng.random((2, 9)), jnp.float32).at[:, 0].set(0)}
    lifted = lambda h, w: lift_sum({"student/main": (h, w)}, terms, weights, tokens=tokens, signals=signals, chunk=8)[0]
    dense = lambda h, w: dense_total({"student/main": (h, w)}, terms, weights, tokens=tokens, signals=signals)
    for a, b in zip(jax.tree.leaves(jax.value_and_grad(lifted, argnums=(0, 1))(hidden, head)),
                    jax.tree.leaves(jax.value_and_grad(dense, argnums=(0, 1))(hidden, head)), strict=True):
        assert rel(a, b) < 1e-5


def test_what_cannot_be_used_is_named():
    with pytest.raises(ValueError, match="needs a top-k signal"):
        renormalised_kl(STUDENT, Full(STUDENT))
    with pytest.raises(ValueError, match="k >= 2 and temperature > 0"):
        renormalised_kl(STUDENT, TopKTarget(FIVE, TEACHER), temperature=0.0)
