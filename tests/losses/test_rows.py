"""Row losses: hand values, a NumPy reference, gradients, and the corners where a NaN would come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from distill_jax.core.head import NEG
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
from distill_jax.losses.rows.logprob import entropy, log_prob
from distill_jax.losses.rows.outcomes import TAIL_FLOOR, log_normalizer, outcomes
from distill_jax.losses.rows.taid import taid
from distill_jax.losses.targets import Full, Labels, TopKTarget

Z_S, Z_T = jnp.array([[0.0, 1, 2]]), jnp.array([[2.0, 0, -2]])
ROW_LOSSES = {
    "ce": cross_entropy, "fkl": forward_kl, "rkl": reverse_kl,
    "jsd": lambda z, t: generalized_jsd(z, t, beta=0.3), "taid": lambda z, t: taid(z, t, t=jnp.float32(0.6)),
    "sfkl": skew_forward_kl, "srkl": skew_reverse_kl, "tv": total_variation,
    "ab": lambda z, t: alpha_beta(z, t, alpha=0.3, beta=0.9), "akl": adaptive_kl,
}
F_DIVERGENCES = ("fkl", "rkl", "jsd", "sfkl", "srkl", "tv")
DIVERGENCES = (*F_DIVERGENCES, "ab", "akl")


@jax.jit
def all_losses(z, target):
    """Every loss in one compilation: {name: [N]}."""
    return {n: f(z, target) for n, f in ROW_LOSSES.items()}


@jax.jit
def all_grads(z, target, weight=1.0):
    """{name: (sum over rows, gradients for logits and target)}."""
    total = lambda f: lambda z, t: weight * f(z, t).sum()
    return {n: jax.value_and_grad(total(f), argnums=(0, 1), allow_int=True)(z, target) for n, f in ROW_LOSSES.items()}


def np_log_softmax(z):
    z = np.asarray(z, np.float64)
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def reference(name, log_q, log_p, beta=0.3, t=0.6, topk=False):
    """Divergences of two log-probability rows in float64, written from their definitions."""
    with np.errstate(divide="ignore", invalid="ignore"):
        q, p = np.exp(log_q), np.exp(log_p)
        kl = lambda a, b: np.where(a > 0, a * (np.log(a) - np.log(b)), 0).sum(-1)
        mix = beta * p + (1 - beta) * q
        inter = np.exp(np_log_softmax(np.where(q > 0, (1 - t) * log_q + t * log_p, NEG)))
        return {
            "ce": -np.where(p > 0, p * log_q, 0).sum(-1), "fkl": kl(p, q), "rkl": kl(q, p),
            "jsd": beta * kl(p, mix) + (1 - beta) * kl(q, mix),
            "taid": -np.where(inter > 0, inter * log_q, 0).sum(-1),
            "sfkl": kl(p, 0.1 * p + 0.9 * q), "srkl": kl(q, 0.9 * p + 0.1 * q), "tv": abs(p - q).sum(-1) / 2,
            "ab": -(p**0.3 * q**0.9 - p**1.2 * 0.3 / 1.2 - q**1.2 * 0.9 / 1.2).sum(-1) / 0.27,
            "akl": adaptive_reference(p, q, kl, topk),
        }[name]


def adaptive_reference(p, q, kl, topk, mu=0.5):
    """Row by row, the head as the smallest prefix that reaches mu; the bucket of a top-k row is never in it."""
    out = []
    for a, b in zip(p, q):
        order = np.argsort(-a[:-1] if topk else -a, kind="stable")
        head = order[:np.searchsorted(np.cumsum(a[order]), mu) + 1]
        share = abs(a - b)[head].sum() / (abs(a - b).sum() or 1)
        out.append(share * kl(a, b) + (1 - share) * kl(b, a))
    return np.array(out)


def topk_of(logits, k):
    logp = np_log_softmax(logits)
    ids = np.argsort(-logp, axis=-1)[:, :k].astype(np.int32)
    return TopKTarget(jnp.asarray(ids), jnp.asarray(np.take_along_axis(logp, ids, -1), jnp.float32))


def collapse(logp, ids):
    """Kept outcomes and the tail, in float64."""
    kept = np.take_along_axis(logp, ids, -1)
    rest = np.stack([np.delete(row, i) for row, i in zip(logp, ids)])
    return np.concatenate([kept, np.log(np.exp(rest).sum(-1, keepdims=True))], -1)


def test_hand_values_full():
    """KL of the cards' example: z_S = (0,1,2), z_T = (2,0,-2)."""
    close = lambda got, want: np.testing.assert_allclose(got, [want], rtol=2e-6)
    full = Full(Z_T)
    close(forward_kl(Z_S, full), 1.817486)  # TAID card, t = 1
    close(forward_kl(Z_S, Full(Z_S)), 0.0)
    uniform = jnp.zeros((1, 3))
    close(reverse_kl(uniform, full), 1.044319)  # M1 card
    close(forward_kl(uniform, full), 0.657555)
    close(cross_entropy(Z_S, Labels(jnp.array([0]))), 2.407606)  # PLD card
    close(taid(Z_S, full, t=jnp.float32(0.5)), 1.727763)  # TAID card
    close(entropy(uniform), np.log(3))
    close(log_prob(Z_S, Labels(jnp.array([2]))), -0.407606)
    p, q = (np.exp(np_log_softmax(z)) for z in (Z_T, Z_S))
    m = (p + q) / 2
    close(generalized_jsd(Z_S, full), (0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()).item())


def test_hand_gradients():
    grad = jax.grad(lambda z: taid(z, Full(Z_T), t=jnp.float32(0.5))[0])(Z_S)
    np.testing.assert_allclose(grad, [[-0.416450, -0.062467, 0.478917]], atol=1e-6)  # TAID card
    np.testing.assert_allclose(jax.grad(lambda z: taid(z, Full(Z_T), t=jnp.float32(0.0))[0])(Z_S), 0, atol=1e-7)


def test_hand_values_topk_and_tail():
    """Two of four outcomes kept: teacher (.5,.3 | .2), student (.4,.1 | .5)."""
    z = jnp.log(jnp.array([[0.4, 0.3, 0.1, 0.2]]))
    target = TopKTarget(jnp.array([[0, 2, -1]]), jnp.log(jnp.array([[0.5, 0.3, 0.0]])))
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.1, 0.5])
    np.testing.assert_allclose(forward_kl(z, target), [(p * np.log(p / q)).sum()], rtol=1e-5)  # 0.257897
    np.testing.assert_allclose(reverse_kl(z, target), [(q * np.log(q / p)).sum()], rtol=1e-5)
    np.testing.assert_allclose(forward_kl(z, target), [0.257897], rtol=1e-5)
    # The gradient of forward KL is q - p outcome by outcome; the tail's share follows the student within it.
    grad = jax.grad(lambda z: forward_kl(z, target)[0])(z)
    np.testing.assert_allclose(grad, [[-0.1, 0.3 * 0.3 / 0.5, -0.2, 0.3 * 0.2 / 0.5]], atol=1e-6)


def test_temperature_factor():
    """Both sides divided by tau, value times tau^2; refused where the tail makes it inexact."""
    want = 4 * reference("fkl", np_log_softmax(Z_S / 2), np_log_softmax(Z_T / 2))
    np.testing.assert_allclose(forward_kl(Z_S, Full(Z_T), temperature=2.0), want, rtol=1e-6)
    want = 4 * reference("jsd", np_log_softmax(Z_S / 2), np_log_softmax(Z_T / 2))
    np.testing.assert_allclose(generalized_jsd(Z_S, Full(Z_T), beta=0.3, temperature=2.0), want, rtol=1e-6)
    with pytest.raises(ValueError, match="full target"):
        forward_kl(Z_S, topk_of(Z_T, 2), temperature=2.0)


def test_jsd_ends_and_normalisation():
    full = Full(Z_T)
    assert generalized_jsd(Z_S, full, beta=0.0) == forward_kl(Z_S, full)
    assert generalized_jsd(Z_S, full, beta=1.0) == reverse_kl(Z_S, full)
    for beta, end in ((1e-3, forward_kl), (1 - 1e-3, reverse_kl)):
        near = generalized_jsd(Z_S, full, beta=beta, normalize=True)
        np.testing.assert_allclose(near, end(Z_S, full), rtol=2e-2)
        np.testing.assert_allclose(generalized_jsd(Z_S, full, beta=beta), beta * (1 - beta) * near, rtol=1e-5)
    np.testing.assert_allclose(generalized_jsd(Z_S, full), generalized_jsd(Z_T, Full(Z_S)), rtol=1e-6)
    with pytest.raises(ValueError, match="0 <= beta <= 1"):
        generalized_jsd(Z_S, full, beta=1.5)


def test_numpy_reference():
    rng = np.random.default_rng(0)
    z, t = (jnp.asarray(rng.normal(size=(5, 11)) * 2, jnp.float32) for _ in range(2))
    log_q, log_p, top = np_log_softmax(z), np_log_softmax(t), topk_of(t, 4)
    ids = np.asarray(top.ids)
    full, kept = all_losses(z, Full(t)), all_losses(z, top)
    for name in ROW_LOSSES:
        np.testing.assert_allclose(full[name], reference(name, log_q, log_p), rtol=2e-5, atol=1e-6)
        want = reference(name, collapse(log_q, ids), collapse(log_p, ids), topk=True)
        np.testing.assert_allclose(kept[name], want, rtol=2e-5, atol=1e-6)


def test_gradients_against_finite_differences():
    """All but TAID and AKL, whose target and weights move with the student without gradient, and TV with its kinks."""
    rng = np.random.default_rng(0)
    z, t = (jnp.asarray(rng.normal(size=(3, 7)), jnp.float32) for _ in range(2))
    loss = jax.jit(lambda z: [f(z, target) for n, f in ROW_LOSSES.items() if n not in ("taid", "akl", "tv")
                              for target in (Full(t), topk_of(t, 3))])
    check_grads(loss, (z,), 1, modes=["rev"], rtol=2e-2, atol=2e-3, eps=1e-2)


def test_zero_at_the_teacher():
    """Value and gradient vanish where the student is the teacher: on full, top-k, and all ids kept.

    Total variation's gradient there is that of the sign of rounding.
    """
    z = jnp.asarray(np.random.default_rng(1).normal(size=(4, 9)), jnp.float32)
    for target in (Full(z), topk_of(z, 3), topk_of(z, 9)):
        grads = all_grads(z, target)
        for name in DIVERGENCES:
            value, (grad, _) = grads[name]
            assert abs(value) < 2e-6 and (np.abs(grad).max() < 2e-6 or name == "tv"), name


def test_no_gradient_to_the_teacher():
    for target in (Full(Z_T), topk_of(Z_T, 2)):
        for name, (_, (_, teacher)) in all_grads(Z_S, target).items():
            floats = [x for x in jax.tree.leaves(teacher) if x.dtype == jnp.float32]
            assert len(floats) == 1 and not np.any(floats[0]), name


def test_padded_vocabularies():
    """Heads padded to different V: only common real ids count, and padding gets no gradient."""
    rng = np.random.default_rng(2)
    z, t = (rng.normal(size=(3, 7)).astype(np.float32) for _ in range(2))
    pad = lambda x, n: jnp.asarray(np.pad(x, ((0, 0), (0, n)), constant_values=NEG))
    want, top = all_losses(jnp.asarray(z), Full(jnp.asarray(t))), topk_of(t, 3)
    for wide, teacher in ((2, 5), (4, 1), (0, 3)):
        for name, (value, (grad, _)) in all_grads(pad(z, wide), Full(pad(t, teacher))).items():
            np.testing.assert_allclose(value, want[name].sum(), rtol=1e-6)
            assert np.all(np.isfinite(grad)) and not np.any(grad[:, 7:]), name
    narrow, padded = all_losses(jnp.asarray(z), top), all_losses(pad(z, 4), top)
    for name in ROW_LOSSES:
        np.testing.assert_allclose(padded[name], narrow[name], rtol=1e-6)


def test_kept_ids_the_student_lacks_fall_into_the_tail():
    """Beyond the student's V (8), or in its vocabulary padding (6)."""
    z = jnp.asarray(np.random.default_rng(2).normal(size=(1, 7)), jnp.float32).at[:, 6].set(NEG)
    log_q, log_p = outcomes(z, TopKTarget(jnp.array([[0, 6, 8]]), jnp.log(jnp.array([[0.4, 0.3, 0.2]]))))
    np.testing.assert_allclose(np.exp(log_p), [[0.4, 0, 0, 0.6]], rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_q).sum(), 1, rtol=1e-6)


def test_confident_student_keeps_its_tail():
    """Tail mass 1e-12: 1 - sum would be rounding noise; value and gradient follow the float64 truth."""
    z = jnp.array([[28.0, 0.0, -1.0, 0.5]])
    target = TopKTarget(jnp.array([[0]]), jnp.log(jnp.array([[0.9]])))
    log_q = collapse(np_log_softmax(z), np.array([[0]]))
    np.testing.assert_allclose(forward_kl(z, target), reference("fkl", log_q, np.log([[0.9, 0.1]])), rtol=1e-6)
    grad = np.asarray(jax.grad(lambda z: forward_kl(z, target)[0])(z))[0]
    share = np.exp(np_log_softmax(z[:, 1:]))[0]
    np.testing.assert_allclose(grad, [0.1, *(-0.1 * share)], rtol=1e-5)


def test_corners_are_finite():
    """Nothing kept, everything kept, all mass kept, tail gone to zero, vocabulary padding, huge logits."""
    z = jnp.asarray([[1.0, -2, 0.5, NEG], [80.0, -90, 0, NEG], [1e4, -1e4, 0, NEG], [0.0, 0, 0, NEG]])
    none, log = -jnp.inf, jnp.log
    corners = {
        "nothing kept": ([-1, -1, -1, -1], [none] * 4),
        "everything kept": ([2, 0, 1, -1], [log(0.7), log(0.2), log(0.1), none]),
        "no tail mass": ([1, -1, -1, -1], [0.0, none, none, none]),
        "an id that does not exist": ([1, 3, -1, -1], [0.0, -50.0, none, none]),
        "mass above 1 by rounding": ([0, 2, -1, -1], [1e-3, none, none, none]),
    }
    for what, (ids, logprobs) in corners.items():
        target = TopKTarget(jnp.tile(jnp.array([ids]), (4, 1)), jnp.tile(jnp.array([logprobs]), (4, 1)))
        for weight in (1.0, 0.0):
            for name, (value, (grad, _)) in all_grads(z, target, jnp.float32(weight)).items():
                assert np.isfinite(value) and np.all(np.isfinite(grad)), (what, name)
                assert not np.any(grad[:, 3]), (what, name)
                assert weight or not np.any(grad)
    for name, (value, (grad, _)) in all_grads(z, Full(z[::-1])).items():
        assert np.isfinite(value) and np.all(np.isfinite(grad)) and not np.any(grad[:, 3]), name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.1, 6), st.floats(0, 1))
def test_random_topk_with_padding(seed, spread, empty):
    """Against float64 on k+1 outcomes with random slots missing; never negative, never above the full divergence."""
    rng = np.random.default_rng(seed)
    z, t = (jnp.asarray(rng.normal(size=(4, 13)) * spread, jnp.float32) for _ in range(2))
    top = topk_of(t, 5)
    gone = rng.random((4, 5)) < empty
    top = TopKTarget(jnp.where(gone, -1, top.ids), jnp.where(gone, -jnp.inf, top.logprobs))
    log_q, log_p = (np.asarray(x) for x in jax.jit(outcomes)(z, top))
    assert np.array_equal(log_q[:, :-1] == np.float32(NEG), gone)
    np.testing.assert_allclose(np.exp(log_q).sum(-1), 1, rtol=1e-5)
    assert np.all(log_q[:, -1] > NEG) and np.all(np.exp(log_p[:, -1]) >= 0.99 * TAIL_FLOOR)
    value, full = all_losses(z, top), all_losses(z, Full(t))
    for name in DIVERGENCES:
        assert np.all(value[name] > -1e-5), name
    for name in F_DIVERGENCES:
        assert np.all(value[name] <= full[name] + 1e-4 + 1e-4 * full[name])
    for name in ROW_LOSSES:
        want = reference(name, log_q.astype(np.float64), log_p.astype(np.float64), topk=True)
        np.testing.assert_allclose(value[name], want, rtol=1e-3, atol=1e-5)


def test_log_normalizer_and_entropy_gradients():
    z = jnp.asarray(np.random.default_rng(3).normal(size=(3, 6)), jnp.float32)
    np.testing.assert_allclose(log_normalizer(z), jax.nn.logsumexp(z, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda z: log_normalizer(z).sum())(z), jax.nn.softmax(z), rtol=1e-5)
    want = lambda z: -(jax.nn.softmax(z) * jax.nn.log_softmax(z)).sum()
    np.testing.assert_allclose(jax.grad(lambda z: entropy(z).sum())(z), jax.grad(want)(z), atol=1e-6)
    padded = jnp.pad(z, ((0, 0), (0, 2)), constant_values=NEG)
    np.testing.assert_allclose(entropy(padded), entropy(z), rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda z: entropy(z).sum())(padded)))


def test_wrong_targets_are_named():
    with pytest.raises(ValueError, match="signal or a provider"):
        forward_kl(Z_S, Labels(jnp.array([0])))
    with pytest.raises(ValueError, match="needs Labels"):
        log_prob(Z_S, Full(Z_T))
