"""Group losses: hand values, NumPy references, gradients, masks, documents, large states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.batch import TokenLogprob, TopK
from distill_jax.core.head import Head
from distill_jax.losses.groups.hidden import cosine_distance, linear_cka, mean_squared_error, relation_kl
from distill_jax.losses.groups.sinkhorn import log_plan, sinkhorn_distance, sinkhorn_kd
from distill_jax.losses.groups.states import States
from distill_jax.losses.groups.transport import sequence_transport

B, T = 2, 7
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 2, 2, 2]], np.int32)
MASK = np.array([[0, 1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1, 0]], bool)


def states(x, mask=MASK, segments=SEGMENTS, **kw):
    return States(x=None if x is None else jnp.asarray(x), mask=jnp.asarray(mask), segment_ids=jnp.asarray(segments),
                  **kw)


def random(width, seed=0):
    return np.random.default_rng(seed).normal(size=(B, T, width)).astype(np.float32)


def value_and_grad(loss, x, y, weights=None, **kwargs):
    """sum of weights * loss and its gradients for both sides."""
    weights = np.ones((B, T), np.float32) if weights is None else weights
    fn = lambda x, y: jnp.sum(weights * loss(states(x), states(y), **kwargs))
    return jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(x, y)


def check_gradient(loss, x, y, tolerance=2e-2, **kwargs):
    """The gradient against central differences along its own direction, and none for the teacher."""
    value, (dx, dy) = value_and_grad(loss, x, y, **kwargs)
    assert np.isfinite(value) and np.all(np.isfinite(dx)) and not np.any(dy)
    assert not np.any(np.asarray(dx)[~MASK]), "a token outside the mask moves nothing"
    norm = float(np.linalg.norm(dx))
    step = np.asarray(dx) / norm * 3e-3
    fn = lambda x: float(np.sum(np.asarray(loss(states(x), states(y), **kwargs), np.float64)))
    np.testing.assert_allclose((fn(x + step) - fn(x - step)) / 6e-3, norm, rtol=tolerance)
    return value


def test_cosine_and_mse_by_hand():
    x, y = np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 2), np.float32)
    x[0], y[0] = [[1, 0], [3, 4]], [[0, 2], [6, 8]]
    both = lambda loss, **kw: loss(states(x, [[True, True]], [[1, 1]]), states(y, [[True, True]], [[1, 1]]), **kw)
    np.testing.assert_allclose(both(cosine_distance), [[1.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(both(mean_squared_error), [[2.5, 12.5]], rtol=1e-6)
    np.testing.assert_allclose(both(mean_squared_error, normalize=True), [[2.0, 0.0]], atol=1e-5)


@pytest.mark.parametrize("loss", [cosine_distance, mean_squared_error])
def test_pointwise_gradients(loss):
    x, y = random(8), random(8, 1)
    check_gradient(loss, x, y)
    same, (dx, _) = value_and_grad(loss, y, y)
    assert abs(same) < 1e-5 and np.abs(dx).max() < 1e-6


def cka_reference(x, y):
    x, y = (a[MASK].astype(np.float64) for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    f = lambda a, b: np.sum((a.T @ b) ** 2)
    return f(x, y) / np.sqrt(f(x, x) * f(y, y))


def test_cka():
    x, y = random(5), random(9, 1)
    got = linear_cka(states(x), states(y))
    np.testing.assert_allclose(got, np.where(MASK, 1 - cka_reference(x, y), 0), rtol=1e-5, atol=1e-6)
    check_gradient(linear_cka, x, y)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))[0].astype(np.float32)
    np.testing.assert_allclose(linear_cka(states(x), states(4 * x @ turn + 1)), 0, atol=2e-6)
    assert not np.any(linear_cka(states(x, ~MASK & False), states(y, ~MASK & False)))


def relation_reference(x, y, heads, causal):
    out = np.zeros((B, T))
    for b in range(B):
        for t in np.nonzero(MASK[b])[0]:
            seen = MASK[b] & (SEGMENTS[b] == SEGMENTS[b, t]) & ((np.arange(T) <= t) | (not causal))
            for h in range(heads):
                logs = []
                for a in (x, y):
                    a = a[b].reshape(T, heads, -1)[:, h].astype(np.float64)
                    z = a[seen] @ a[t] / np.sqrt(a.shape[1])
                    logs.append(z - np.log(np.exp(z).sum()))
                out[b, t] += np.sum(np.exp(logs[1]) * (logs[1] - logs[0])) / heads
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_relations(causal):
    x, y = random(4), random(6, 1)
    got = relation_kl(states(x), states(y), heads=2, causal=causal)
    np.testing.assert_allclose(got, relation_reference(x, y, 2, causal), rtol=1e-4, atol=1e-6)


def test_relation_gradient_and_chunks(monkeypatch):
    x, y = random(4), random(6, 1)
    whole = check_gradient(relation_kl, x, y, heads=2)
    monkeypatch.setattr("distill_jax.losses.groups.hidden.QUERIES", 3)  # the last chunk is cut short
    np.testing.assert_allclose(value_and_grad(relation_kl, x, y, heads=2)[0], whole, rtol=1e-5)
    with pytest.raises(ValueError, match="heads=4 does not divide the teacher's width 6"):
        relation_kl(states(x), states(y), heads=4)


P = np.array([[.7, .2, .1], [.1, .2, .7]], np.float32)
Q = np.array([[.5, .3, .2], [.2, .3, .5]], np.float32)


def test_sinkhorn_by_hand():
    """Values of the published loss, which is not divided by the number of points."""
    np.testing.assert_allclose(sinkhorn_distance(P[:1], Q[:1]), 0.4, rtol=1e-6)
    np.testing.assert_allclose(2 * sinkhorn_distance(P, P), 1.4746e-5, rtol=1e-3)
    np.testing.assert_allclose(2 * sinkhorn_distance(P, P[::-1]), 1.4746e-5, rtol=1e-3)
    np.testing.assert_allclose(2 * sinkhorn_distance(P, Q), 0.802967, rtol=1e-5)


def test_sinkhorn_is_the_published_loop():
    """`loss.py` of 2018cx/SinKD in NumPy: exp, then rows and columns divided by their sums, 20 times."""
    rng = np.random.default_rng(7)
    p, q = (rng.dirichlet(np.ones(9), 5) for _ in range(2))
    cost = np.abs(p[:, None] - q[None]).sum(-1)
    plan = np.exp(-cost / 0.1)
    for _ in range(20):
        plan /= plan.sum(1, keepdims=True)
        plan /= plan.sum(0, keepdims=True)
    got = 5 * sinkhorn_distance(p.astype(np.float32), q.astype(np.float32))
    np.testing.assert_allclose(got, np.sum(plan * cost), rtol=1e-4)


def test_sinkhorn_is_blind_to_pairing_and_absent_points():
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(5), 6).astype(np.float32) for _ in range(2))
    fn = jax.jit(jax.value_and_grad(lambda p, q, there: sinkhorn_distance(p, q, present=there)))
    there = np.array([1, 1, 0, 1, 1, 0], bool)
    value, grad = fn(p, q, there)
    mixed, _ = fn(p, q[[1, 4, 2, 0, 3, 5]], there)
    np.testing.assert_allclose(mixed, value, rtol=1e-5)
    alone = sinkhorn_distance(p[there], q[there])
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    assert not np.any(grad[~there]) and np.all(np.isfinite(grad))
    step = np.asarray(grad) / np.linalg.norm(grad) * 1e-3
    slope = (fn(p + step, q, there)[0] - fn(p - step, q, there)[0]) / 2e-3
    np.testing.assert_allclose(slope, np.linalg.norm(grad), rtol=2e-2)


def test_plan_in_the_log_domain():
    """Columns sum to their mass exactly; a tiny eps, where exp(-W / eps) is zero, still gives a plan."""
    cost = np.random.default_rng(1).random((4, 4)).astype(np.float32)
    for eps in (0.1, 1e-3):
        plan = np.exp(log_plan(cost, np.zeros(4, np.float32), np.zeros(4, np.float32), eps=eps, iterations=20))
        np.testing.assert_allclose(plan.sum(0), 1, rtol=1e-4)
    assert np.exp(-cost.astype(np.float64) / 1e-4).max() < 1e-40 or np.isfinite(plan).all()


def test_transport_plan_by_hand():
    """<P, C> of the cards: uniform marginals, total mass 1."""
    for cost, want in (([[0, 1], [1, 0]], 4.54e-5), ([[0, 1, 1], [1, 0, 1]], 0.333364), ([[0.3]], 0.3)):
        cost = np.array(cost, np.float32)
        marginals = [np.full(n, -np.log(n), np.float32) for n in cost.shape]
        plan = np.exp(log_plan(cost, *marginals, eps=0.1, iterations=100))
        np.testing.assert_allclose(np.sum(plan * cost), want, rtol=1e-3)
        np.testing.assert_allclose(plan.sum(0), 1 / cost.shape[1], rtol=1e-5)
        np.testing.assert_allclose(plan.sum(1), 1 / cost.shape[0], rtol=1e-5)


def one_head(width, vocab, seed=5):
    return Head(kernel=jnp.asarray(np.random.default_rng(seed).normal(size=(vocab, width)), jnp.float32))


def test_sinkhorn_kd_equals_the_dense_one():
    x, y, head, teachers = random(6), random(4, 1), one_head(6, 11), one_head(4, 13, 6)
    side = lambda x, head: states(x, head=head)
    got = sinkhorn_kd(side(x, head), side(y, teachers))
    soft = lambda x, h: jax.nn.softmax(h.logits(jnp.asarray(x[MASK]))[:, :11] / 2.0, axis=-1)
    np.testing.assert_allclose(got, np.where(MASK, sinkhorn_distance(soft(x, head), soft(y, teachers)), 0), rtol=1e-5)
    few = sinkhorn_kd(side(x, head), side(y, teachers), tokens=4)  # every third or so of the ten
    chosen = np.nonzero(MASK.reshape(-1))[0][[0, 2, 5, 7]]
    pick = lambda x: x.reshape(-1, x.shape[-1])[chosen]
    soft = lambda x, h: jax.nn.softmax(h.logits(jnp.asarray(pick(x)))[:, :11] / 2.0, axis=-1)
    np.testing.assert_allclose(few[MASK], float(sinkhorn_distance(soft(x, head), soft(y, teachers))), rtol=1e-5)


def test_sinkhorn_kd_on_a_signal():
    """All ids kept: the same as with the teacher at hand; fewer: the rest is each token's tail."""
    x, head, V = random(6), one_head(6, 5), 5
    z = np.random.default_rng(2).normal(size=(B, T, V))
    logp = (z - np.log(np.exp(z).sum(-1, keepdims=True))).astype(np.float32)
    order = np.argsort(-logp, -1).astype(np.int32)
    kept = lambda k: TopK(ids=jnp.asarray(order[..., :k]), mask=jnp.asarray(MASK),
                          logprobs=jnp.asarray(np.take_along_axis(logp, order, -1)[..., :k]))
    signal = lambda k: states(None, signal=kept(k))
    p = jax.nn.softmax(head.logits(jnp.asarray(x[MASK])), -1)
    got = sinkhorn_kd(states(x, head=head), signal(V), temperature=1.0)
    np.testing.assert_allclose(got[MASK], float(sinkhorn_distance(p, np.exp(logp[MASK]))), rtol=1e-4)
    q = np.zeros((MASK.sum(), V + 1), np.float32)
    for i, (row, ids) in enumerate(zip(logp[MASK], order[MASK])):
        q[i, ids[:1]] = np.exp(row[ids[:1]])
        q[i, -1] = 1 - q[i].sum()
    union = np.isin(np.arange(V), order[MASK][:, 0])
    p = np.concatenate([np.where(union, p, 0), np.where(union, 0, p).sum(-1, keepdims=True)], -1)
    got, grad = jax.value_and_grad(
        lambda x: sinkhorn_kd(states(x, head=head), signal(1), temperature=1.0)[0, 1])(jnp.asarray(x))
    np.testing.assert_allclose(got, sinkhorn_distance(p, q), rtol=1e-4)
    assert np.all(np.isfinite(grad)) and np.any(grad)
    with pytest.raises(ValueError, match="temperature=2"):
        sinkhorn_kd(states(x, head=head), signal(1))
    with pytest.raises(ValueError, match="TokenLogprob"):
        token = TokenLogprob(logprobs=kept(1).logprobs[..., 0], mask=kept(1).mask)
        sinkhorn_kd(states(x, head=head), states(None, signal=token), temperature=1.0)


def transport_reference(x, y, there, segments, eps=0.1):
    """Document by document, in the linear domain. -> N sum_j P_ij C_ij of each token."""
    out = np.zeros((B, T))
    x, y = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (x.astype(np.float64), y.astype(np.float64)))
    for b in range(B):
        for s in (1, 2):
            i, j = np.nonzero(MASK[b] & (SEGMENTS[b] == s))[0], np.nonzero(there[b] & (segments[b] == s))[0]
            if not len(i) or not len(j):
                continue
            cost = 1 - x[b, i] @ y[b, j].T
            k, v = np.exp(-cost / eps), np.ones(len(j))
            for _ in range(500):
                u = 1 / len(i) / (k @ v)
                v = 1 / len(j) / (k.T @ u)
            out[b, i] = len(i) * np.sum(u[:, None] * k * v[None] * cost, 1)
    return out


def test_sequence_transport():
    """Two views of other lengths, packed; one document lacks its counterpart. Gradient: the plan is a constant."""
    rng = np.random.default_rng(4)
    x, y = random(5), rng.normal(size=(B, 9, 5)).astype(np.float32)
    segments = np.array([[1] * 5 + [2] * 4, [1] * 6 + [3] * 3], np.int32)
    there = rng.random((B, 9)) < 0.8
    fn = lambda x, y: sequence_transport(states(x), states(y, there, segments), iterations=300)
    got = fn(x, y)
    np.testing.assert_allclose(got, transport_reference(x, y, there, segments), rtol=1e-3, atol=1e-5)
    dx, dy = jax.grad(lambda x, y: jnp.sum(fn(x, y)), argnums=(0, 1))(jnp.asarray(x), jnp.asarray(y))
    assert not np.any(dy) and np.all(np.isfinite(dx)) and not np.any(dx[~(got > 0)])
    # Against the gradient of <P, C> with P held: the entropic objective's envelope.
    step = np.asarray(dx) / np.linalg.norm(dx) * 1e-2
    objective = lambda x: sum(_entropic(x, y, there, segments))
    slope = (objective(x + step) - objective(x - step)) / 2e-2
    np.testing.assert_allclose(slope, np.linalg.norm(dx), rtol=1e-2)


def _entropic(x, y, there, segments, eps=0.1):
    """N min_P <P, C> - eps H(P) of each document: what the gradient with a constant plan belongs to."""
    x, y = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (x.astype(np.float64), y.astype(np.float64)))
    for b in range(B):
        for s in (1, 2):
            i, j = np.nonzero(MASK[b] & (SEGMENTS[b] == s))[0], np.nonzero(there[b] & (segments[b] == s))[0]
            if len(i) and len(j):
                cost = 1 - x[b, i] @ y[b, j].T
                k, v = np.exp(-cost / eps), np.ones(len(j))
                for _ in range(500):
                    u = 1 / len(i) / (k @ v)
                    v = 1 / len(j) / (k.T @ u)
                plan = u[:, None] * k * v[None]
                yield len(i) * np.sum(plan * cost + eps * plan * np.log(plan))


def test_equal_sequences_cost_nothing_as_eps_goes_to_zero():
    x = random(8)
    got = sequence_transport(states(x), states(x), eps=1e-3, iterations=20)
    np.testing.assert_allclose(got, 0, atol=1e-4)


LOSSES = {
    "cosine": (cosine_distance, {}), "mse": (mean_squared_error, {"normalize": True}), "cka": (linear_cka, {}),
    "relation": (relation_kl, {"heads": 2}), "transport": (sequence_transport, {"iterations": 20}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_masked_out_does_not_matter_and_large_states_are_finite(name):
    """Garbage outside the mask changes neither value nor gradient; bf16 states of size 1e4 give finite ones."""
    loss, kwargs = LOSSES[name]
    x, y = random(6), random(6, 1)
    garbage = lambda a: np.where(MASK[..., None], a, 77.0).astype(np.float32)
    plain, other = (value_and_grad(loss, f(x), f(y), **kwargs) for f in (lambda a: a, garbage))
    np.testing.assert_allclose(plain[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(plain[1][0], other[1][0], rtol=1e-3, atol=1e-5)
    big = [jnp.asarray(1e4 * a, jnp.bfloat16) for a in (x, y)]
    value, (dx, _) = value_and_grad(loss, *big, **kwargs)
    assert np.isfinite(value) and np.all(np.isfinite(np.asarray(dx, np.float32)))
    zero, (dx, _) = value_and_grad(loss, 0 * x, 0 * y, **kwargs)
    assert np.isfinite(zero) and np.all(np.isfinite(dx))


def test_widths_and_sides_that_do_not_fit():
    with pytest.raises(ValueError, match=r"width 4 \(student\) and 6 \(teacher\).*Projector"):
        cosine_distance(states(random(4)), states(random(6)))
    with pytest.raises(ValueError, match="a stored signal has none"):
        cosine_distance(states(random(4)), states(None))
