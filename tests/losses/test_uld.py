"""ULD and the hybrid loss: the card's hand values, NumPy references, gradients, outcomes the student has no id for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.core.batch import FOREIGN, TopK
from distill_jax.core.head import NEG
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.uld import hybrid_uld, uld
from distill_jax.losses.targets import Full, Labels, SampledTarget, TopKTarget
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_sum
from tests.objective.dense import dense_total, random_head, rel


def rows(*p):
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.maximum(np.log(np.array(p, np.float64)), NEG), jnp.float32)


def kept(ids, p):
    """One row of a top-k signal."""
    with np.errstate(divide="ignore"):
        return TopKTarget(jnp.array([ids], jnp.int32), jnp.asarray(np.log([p]), jnp.float32))


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z))
    return e / e.sum()


def by_rank(q, p, held_q, held_p):
    """Sorted L1 of some masses and of what is left of both sides, in float64."""
    q, p = (np.sort(np.asarray(x, np.float64))[::-1] for x in (q, p))
    q = np.pad(q[:len(p)], (0, max(0, len(p) - len(q))))
    return np.abs(q - p).sum() + abs((1 - held_q - q.sum()) - (1 - held_p - p.sum()))


def reference(z, ids, lp, beta=0.5):
    """(uld, hybrid) of one row against kept outcomes, from their definitions."""
    q, there = softmax(z), ids >= 0
    p, ids = np.exp(lp[there].astype(np.float64)), ids[there]
    foreign = ids >= FOREIGN
    known, p_known = ids[~foreign], p[~foreign]
    a, b = np.append(p_known, 1 - p_known.sum()), np.append(q[known], 1 - q[known].sum())
    m = beta * a + (1 - beta) * b
    kl = lambda x: np.where(x > 0, x * np.log(np.maximum(x, 1e-300) / m), 0).sum()
    rest = np.delete(q, known)
    return (by_rank(q, p, 0, 0), beta * kl(a) + (1 - beta) * kl(b)
            + by_rank(rest, p[foreign], q[known].sum(), p_known.sum()))


def random_row(seed, vocab=13, k=5, foreign=0.4, gone=0.3):
    rng = np.random.default_rng(seed)
    p = np.sort(rng.dirichlet(np.full(2 * vocab, 0.3)))[::-1][:k]
    ids = rng.permutation(vocab)[:k].astype(np.int32)
    ids = np.where(rng.random(k) < foreign, FOREIGN + rng.permutation(100)[:k], ids)
    ids = np.where((rng.random(k) < gone) | (p < 1e-12), -1, ids).astype(np.int32)
    lp = np.where(ids >= 0, np.log(np.maximum(p, 1e-30)), -np.inf).astype(np.float32)
    return rng.normal(size=vocab).astype(np.float32) * 2, ids, lp


full = jax.jit(jax.value_and_grad(lambda z, t, tau=1.0: uld(z, Full(t), temperature=tau).sum()), static_argnums=2)
hybrid = jax.jit(hybrid_uld, static_argnames=("beta", "matched", "unmatched"))
both = jax.jit(lambda z, t: (uld(z, t), hybrid_uld(z, t)))
gradients = jax.jit(lambda z, t: tuple(jax.grad(lambda z, f=f: f(z, t).sum())(z) for f in (uld, hybrid_uld)))


def test_hand_values():
    """The ULD card: a permutation costs nothing, either side may be shorter, the order of the sides does not matter."""
    q = rows([0.7, 0.2, 0.1])
    cases = [(q, rows([0.1, 0.7, 0.2]), 0.0), (q, rows([0.5, 0.3, 0.2]), 0.4),
             (rows([0.6, 0.4]), rows([0.5, 0.3, 0.2]), 0.4)]
    for a, b, want in cases:
        np.testing.assert_allclose([full(a, b)[0], full(b, a)[0]], want, atol=1e-6)
    np.testing.assert_allclose(full(rows([1.0, 0, 0]), rows([0.25] * 4))[0], 1.5, atol=1e-6)
    tempered = [softmax(np.log(x) / 2) for x in ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2])]
    np.testing.assert_allclose(full(q, rows([0.5, 0.3, 0.2]), 2.0)[0], np.abs(np.subtract(*tempered)).sum(), rtol=1e-5)


def test_hand_values_topk():
    """Student (.4, .3, .2, .1). Kept .5 and .3 of an id it has and one it has not: ranks .1 + 0, tails .3 - .2."""
    z = rows([0.4, 0.3, 0.2, 0.1])
    target = kept([3, FOREIGN + 9], [0.5, 0.3])
    np.testing.assert_allclose(both(z, target)[0], [0.1 + 0.0 + 0.1], atol=1e-6)
    np.testing.assert_allclose(both(z, kept([3, -1], [0.5, 0.0]))[0], [0.1 + 0.1], atol=1e-6)  # one rank, tails .6, .5
    # Hybrid: (.5 | .5) against (.1 | .9), then .3 against the best of the rest .4, and .2 against .5.
    kl = 0.5 * np.log(0.5 / 0.1) + 0.5 * np.log(0.5 / 0.9)
    np.testing.assert_allclose(hybrid(z, target, beta=0.0), [kl + 0.1 + 0.3], atol=1e-6)
    np.testing.assert_allclose(hybrid(z, target, beta=0.0, matched=0.25, unmatched=2.0), [kl / 4 + 0.8], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_numpy_reference(seed, foreign):
    z, ids, lp = random_row(seed, foreign=foreign)
    got = both(jnp.asarray(z)[None], TopKTarget(jnp.asarray(ids)[None], jnp.asarray(lp)[None]))
    want = reference(z, ids, lp)
    np.testing.assert_allclose([float(x[0]) for x in got], want, rtol=1e-4, atol=3e-6)
    assert 0 <= got[0][0] <= 2 + 1e-5


def test_gradient_in_closed_form():
    """sign(q - p at q's rank) through the softmax, for the full and the kept ranks; the tail moves as one."""
    z = np.array([0.3, 1.2, -0.5, 0.9], np.float32)
    q = softmax(z)
    through = lambda s: q * (s - (q * s).sum())
    teacher = np.array([0.55, 0.2, 0.15, 0.1])
    order = np.argsort(-q)
    signs = np.empty(4)
    signs[order] = np.sign(q[order] - teacher)
    np.testing.assert_allclose(full(jnp.asarray(z)[None], rows(teacher))[1][0], through(signs), atol=1e-6)
    signs[order[2:]] = np.sign(q[order[2:]].sum() - 0.25)
    got = gradients(jnp.asarray(z)[None], kept([2, FOREIGN], [0.55, 0.2]))[0]
    np.testing.assert_allclose(got[0], through(signs), atol=1e-6)


def test_hybrid_gradient_by_differences():
    z, ids, lp = random_row(5, gone=0.0)
    target = TopKTarget(jnp.asarray(ids)[None], jnp.asarray(lp)[None])
    assert 0 < (ids >= FOREIGN).sum() < 5
    grad, eps = np.asarray(gradients(jnp.asarray(z)[None], target)[1])[0], 1e-3
    for v in range(len(z)):
        step = np.eye(len(z), dtype=np.float64)[v] * eps
        slope = (reference(z + step, ids, lp)[1] - reference(z - step, ids, lp)[1]) / (2 * eps)
        np.testing.assert_allclose(grad[v], slope, atol=2e-4)


def test_zero_at_the_teacher():
    """Also where the student is the teacher under other ids: only ranks can then be compared. (The slope of |x| at 0 is
    arbitrary: rounding leaves it anywhere between -1 and 1.)"""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), jnp.float32)
    top, ids = jax.lax.top_k(jax.nn.log_softmax(z), 4)
    for teacher in (z, z[:, ::-1]):
        value, grad = full(z, teacher)
        assert abs(value) < 3e-6 and np.abs(grad).max() < 1
    for target in (TopKTarget(ids, top), TopKTarget(ids + FOREIGN, top)):
        for value, grad in zip(both(z, target), gradients(z, target)):
            assert np.all(np.abs(value) < 3e-6) and np.abs(grad).max() < 1


def test_without_foreign_ids_the_hybrid_is_a_divergence_and_a_tail():
    z, ids, lp = random_row(3, foreign=0.0)
    target = TopKTarget(jnp.asarray(ids)[None], jnp.asarray(lp)[None])
    inside = ids >= 0
    tails = abs((1 - softmax(z)[ids[inside]].sum()) - (1 - np.exp(lp[inside]).sum()))
    z = jnp.asarray(z)[None]
    np.testing.assert_allclose(hybrid(z, target, beta=0.0), jax.jit(forward_kl)(z, target) + tails, atol=1e-5)


def test_foreign_outcomes_are_tail_to_other_losses():
    """Any divergence gives what it gives when they are left out; the padded end of a head changes nothing."""
    z, ids, lp = random_row(8, gone=0.0)
    foreign = ids >= FOREIGN
    assert foreign.any()
    a = TopKTarget(jnp.asarray(ids)[None], jnp.asarray(lp)[None])
    b = TopKTarget(jnp.asarray(np.where(foreign, -1, ids))[None], jnp.asarray(np.where(foreign, -np.inf, lp))[None])
    wide = jnp.pad(jnp.asarray(z)[None], ((0, 0), (0, 6)), constant_values=NEG)
    kl = jax.jit(forward_kl)
    np.testing.assert_allclose(kl(wide, a), kl(wide, b), rtol=1e-6)
    for got, want in zip(both(wide, a), both(jnp.asarray(z)[None], a)):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for grad in gradients(wide, a):
        assert not np.any(grad[:, 13:]) and np.abs(grad).sum() > 0


def test_corners_are_finite():
    """Huge logits, nothing kept, everything kept, fewer ids than ranks."""
    z = jnp.asarray([[1e4, -1e4, 0, 5.0, NEG], [0.0, 0, 0, 0, NEG]])
    for ids, p in (([-1] * 6, [0.0] * 6), ([0, 1, 2, 3, -1, -1], [0.4, 0.3, 0.2, 0.1, 0, 0]),
                   ([FOREIGN + i for i in range(6)], [0.3, 0.2, 0.2, 0.1, 0.1, 0.1]),
                   ([4, 0, -1, -1, -1, -1], [0.5, 0.5] + [0] * 4)):
        one = kept(ids, p)
        target = TopKTarget(jnp.tile(one.ids, (2, 1)), jnp.tile(one.logprobs, (2, 1)))
        for value, grad in zip(both(z, target), gradients(z, target)):
            assert np.all(np.isfinite(value)) and np.all(np.isfinite(grad)) and not np.any(grad[:, 4])
    value, grad = full(z, -z[:, :4])
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_lifted():
    """Value and gradients through the lift, in chunks, equal the dense ones."""
    rng = np.random.default_rng(1)
    b, t, d, vocab, k = 2, 11, 6, 23, 4
    sources = {"student/main": (jnp.asarray(rng.normal(size=(b, t, d)), jnp.float32), random_head(rng, vocab, d)),
               "teacher/main": (jnp.asarray(rng.normal(size=(b, t, d)), jnp.float32), random_head(rng, vocab + 9, d))}
    made = [random_row(int(s), vocab=vocab, k=k) for s in rng.integers(0, 9999, b * t)]
    signal = TopK(ids=jnp.asarray(np.stack([m[1] for m in made]).reshape(b, t, k)), mask=jnp.ones((b, t), bool),
                  logprobs=jnp.asarray(np.stack([m[2] for m in made]).reshape(b, t, k)))
    terms = {"uld": RowTerm(loss=uld, target="signals/topk"), "online": RowTerm(loss=uld, target="teacher/main"),
             "hybrid": RowTerm(loss=hybrid_uld, target="signals/topk", kwargs={"beta": 0.3})}
    tokens = jnp.asarray(rng.integers(0, vocab, (b, t)), jnp.int32)
    weights = {n: jnp.asarray(rng.random((b, t)) * (rng.random((b, t)) < 0.7), jnp.float32) for n in terms}
    run = lambda fn: jax.jit(jax.value_and_grad(fn))(sources)
    want = run(lambda s: dense_total(s, terms, weights, tokens=tokens, signals={"topk": signal}))
    got = run(lambda s: lift_sum(s, terms, weights, tokens=tokens, signals={"topk": signal}, chunk=8)[0])
    assert rel(got[0], want[0]) < 1e-5
    for one, two in zip(jax.tree.leaves(got[1]["student/main"]), jax.tree.leaves(want[1]["student/main"])):
        assert np.linalg.norm(two) > 1e-3 and rel(one, two) < 1e-5
    assert not any(np.any(x) for x in jax.tree.leaves(got[1]["teacher/main"]))


def test_wrong_targets_are_named():
    z = jnp.zeros((1, 4))
    two = kept([0, 1], [0.5, 0.3])
    sampled = SampledTarget(jnp.array([[0, 1]]), jnp.array([[0.5, 0.5]]))
    for loss, target in ((uld, Labels(jnp.array([0]))), (uld, sampled), (hybrid_uld, Full(z)), (hybrid_uld, sampled)):
        with pytest.raises(ValueError, match=r"needs .*topk"):
            loss(z, target)
    with pytest.raises(ValueError, match=r"temperature=2\.0"):
        uld(z, two, temperature=2.0)
    with pytest.raises(ValueError, match="at least 2"):
        uld(z, kept([0], [0.5]))


@pytest.mark.parity
def test_official_formula():
    """The published code's lines in torch: softmax, sort, pad, sum of absolute differences, mean over positions."""
    import torch
    import torch.nn.functional as F

    rng = np.random.default_rng(4)
    student, teacher = (rng.normal(size=(1, 6, v)).astype(np.float32) for v in (11, 17))
    s = torch.tensor(student, requires_grad=True)
    p_s, p_t = (F.softmax(x, -1).sort(dim=-1, descending=True).values for x in (s, torch.tensor(teacher)))
    p_s = F.pad(p_s, (0, 17 - 11))
    loss = (p_s - p_t).abs().sum(-1).mean()
    loss.backward()
    value, grad = jax.value_and_grad(lambda z: uld(z, Full(jnp.asarray(teacher[0]))).mean())(jnp.asarray(student[0]))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, s.grad.numpy()[0], atol=1e-6)
