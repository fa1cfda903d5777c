"""lift_sum and lift_tokens equal the dense loss: value, hidden gradient, head gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl, generalized_jsd, reverse_kl
from distill_jax.losses.rows.logprob import entropy
from distill_jax.losses.rows.taid import taid
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_sum
from tests.objective.dense import dense_total, random_head, random_token_signal, random_topk, rel

B, T, D, V = 3, 13, 8, 37


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = lambda d: jnp.asarray(rng.normal(size=(B, T, d)), jnp.float32)
    sources = {
        "student/main": (hidden(D), random_head(rng, V, D, with_bias=True, scale=0.7, soft_cap=5.0, real=V - 3)),
        "peer/main": (hidden(4), random_head(rng, V, 4)),
        "teacher/main": (hidden(6), random_head(rng, V + 5, 6, real=V - 3)),
    }
    terms = {
        "ce": RowTerm(loss=cross_entropy),
        "kd": RowTerm(loss=forward_kl, target="signals/topk"),
        "token": RowTerm(loss=reverse_kl, target="signals/token"),
        "online": RowTerm(loss=generalized_jsd, target="teacher/main", kwargs={"beta": 0.3}),
        "mutual": RowTerm(loss=forward_kl, source="peer/main", target="student/main", kwargs={"temperature": 2.0}),
        "taid": RowTerm(loss=taid, target="signals/topk", dynamic={"t": jnp.float32(0.4)}),
        "entropy": RowTerm(loss=entropy, source="peer/main"),
    }
    tokens = jnp.asarray(rng.integers(0, V - 3, (B, T)), jnp.int32)
    weights = {n: jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.6), jnp.float32) for n in terms}
    signals = {"topk": random_topk(rng, (B, T), V - 3, 5), "token": random_token_signal(rng, (B, T))}
    return sources, terms, weights, tokens, signals


TRAINED = ("student/main", "peer/main")


def value_and_grads(fn, sources):
    """Gradients for the trained sources; the teacher is a constant."""
    split = lambda t: fn({**sources, **t})
    return jax.jit(jax.value_and_grad(split))({s: sources[s] for s in TRAINED})


@pytest.mark.parametrize("chunk", [8, 16, 512])
def test_equals_dense(case, chunk):
    sources, terms, weights, tokens, signals = case
    want = value_and_grads(lambda s: dense_total(s, terms, weights, tokens=tokens, signals=signals), sources)
    got = value_and_grads(lambda s: lift_sum(s, terms, weights, tokens=tokens, signals=signals, chunk=chunk)[0],
                          sources)
    assert rel(got[0], want[0]) < 1e-5
    for path, leaf in jax.tree_util.tree_leaves_with_path(want[1]):
        other = dict(jax.tree_util.tree_leaves_with_path(got[1]))[path]
        assert np.linalg.norm(leaf) > 1e-3, f"{path}: nothing to compare"
        assert rel(other, leaf) < 1e-5, path
