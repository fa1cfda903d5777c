"""Fidelity of signals: what a target lets the student know is what the losses train on, and the measures by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.eval.fidelity import RENORMALISED, WHOLE, Fidelity, figure, known, projection, table, write
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.targets import Full, SampledTarget, TopKTarget

N, V, K, F = 6, 31, 4, 5


@pytest.fixture(scope="module")
def chunk():
    rng = np.random.default_rng(0)
    teacher, student = (jnp.asarray(2 * rng.normal(size=(N, V)), jnp.float32) for _ in range(2))
    logp = jax.nn.log_softmax(teacher)
    best, ids = jax.lax.top_k(logp, K)
    ids = ids.at[1, 2:].set(-1).at[N - 1].set(-1)  # the last is filled up: nothing is said of it
    topk = TopKTarget(ids, jnp.where(ids >= 0, best, -jnp.inf))
    draws = SampledTarget(ids, jnp.where(ids >= 0, jnp.asarray([[0.4, 0.3, 0.2, 0.1]]), 0.0).at[1, 0].set(0.7))
    return teacher, student, jnp.asarray(rng.normal(size=(N, F)), jnp.float32), topk, draws


def test_known_is_what_the_losses_train_on(chunk):
    """Student minus `known` is the gradient of forward KL with respect to the student's logits."""
    teacher, student, _, topk, _ = chunk
    for target in (topk, Full(teacher)):
        gradient = jax.grad(lambda z, t=target: jnp.sum(forward_kl(z, t)))(student)
        np.testing.assert_allclose(jax.nn.softmax(student) - known(student, target), gradient, atol=2e-6)
    np.testing.assert_allclose(np.sum(known(student, topk, renormalised=True), axis=-1)[:-1], 1, rtol=1e-5)


def measured(chunk, valid, targets, **kwargs):
    teacher, student, features, *_ = chunk
    out = Fidelity(bytes={"topk": 10.0, "draws": 5.0}, **kwargs)
    out.add(teacher, student, features, jnp.argmax(teacher, axis=-1), jnp.asarray(valid), targets)
    return out


def test_measures_against_numpy(chunk):
    teacher, student, features, topk, draws = chunk
    valid = np.array([True] * (N - 1) + [False])
    report = measured(chunk, valid, {"topk": topk, "draws": draws, "full": Full(teacher)}).report()
    assert report["tokens"] == N - 1 and set(report["signals"]) == {
        WHOLE, "topk", "topk" + RENORMALISED, "draws", "full"}
    full, whole = report["signals"]["full"], report["signals"][WHOLE]
    for m in (full, whole):
        assert m["angle_logits"] < 0.1 and m["angle_head"] < 0.1 and m["norm_head"] == pytest.approx(1, abs=1e-5)
        assert m["kl"] == pytest.approx(0, abs=1e-6) and m["tv"] == pytest.approx(0, abs=1e-6)
    p, q = (np.asarray(jax.nn.softmax(x), np.float64)[:-1] for x in (teacher, student))
    f = np.asarray(features, np.float64)[:-1]
    degrees = lambda a, b: np.degrees(np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
    for name, target, renormalised in (("topk", topk, False), ("topk" + RENORMALISED, topk, True),
                                       ("draws", draws, False)):
        m, r = report["signals"][name], np.asarray(known(student, target, renormalised), np.float64)[:-1]
        assert m["angle_logits"] == pytest.approx(degrees(q - r, q - p), rel=1e-3)
        assert m["angle_head"] == pytest.approx(degrees((q - r).T @ f, (q - p).T @ f), rel=1e-3)
        assert m["norm_logits"] == pytest.approx(np.linalg.norm(q - r) / np.linalg.norm(q - p), rel=1e-4)
        assert m["norm_head"] == pytest.approx(np.linalg.norm((q - r).T @ f) / np.linalg.norm((q - p).T @ f), rel=1e-4)
        assert m["tv"] == pytest.approx(0.5 * np.abs(p - r).sum(1).mean(), rel=1e-4)
        if name == "topk":
            assert m["kl"] == pytest.approx((p * np.log(p / r)).sum(1).mean(), rel=1e-3)
        else:
            assert m["kl"] is None  # ids without mass
        confidence = r.max(1)
        bins = np.minimum((confidence * 15).astype(int), 14)
        hits = r.argmax(1) == p.argmax(1)
        gap = sum(abs((confidence - hits)[bins == b].sum()) for b in range(15)) / (N - 1)
        assert m["ece"] == pytest.approx(gap, rel=1e-4)
    assert report["signals"]["topk" + RENORMALISED]["bytes_per_token"] == 10.0


def test_chunks_add_up_and_are_written(chunk, tmp_path):
    _, _, _, topk, draws = chunk
    spoken = np.arange(N) < N - 1
    whole = measured(chunk, spoken, {"topk": topk, "draws": draws})
    parts = measured(chunk, np.arange(N) < 2, {"topk": topk, "draws": draws})
    rest = measured(chunk, spoken & (np.arange(N) >= 2), {"topk": topk, "draws": draws})
    parts.total = jax.tree.map(np.add, parts.total, rest.total)
    for name, m in whole.report()["signals"].items():
        numbers = lambda measures: [x for x in measures.values() if x is not None]
        assert numbers(parts.report()["signals"][name]) == pytest.approx(numbers(m), rel=1e-4, abs=0.05)
    report = whole.report()
    lines = table(report).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [WHOLE, "draws", "topk", "topk" + RENORMALISED]
    assert "| 5.0 |" in lines[3] and " - " in lines[3]
    assert len(figure(report).axes[0].lines) == 3 + 2  # a line a kind, and the goal
    assert all(p.stat().st_size > 100 for p in write(report, tmp_path / "out"))
    with pytest.raises(ValueError, match="no token was measured"):
        Fidelity(bytes={}).report()


def test_projection_keeps_inner_products():
    assert np.array_equal(projection(F), np.eye(F))
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 40, 3000)).astype(np.float32)
    b = 0.5 * a + 0.5 * b
    p = projection(3000)
    cosine = lambda x, y: (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert cosine(a @ p, b @ p) == pytest.approx(cosine(a, b), abs=0.05)
