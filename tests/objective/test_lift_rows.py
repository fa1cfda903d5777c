"""Every row loss through the lift, on each kind of target: value and gradients of the dense computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.rows.adaptive import adaptive_kl
from distill_jax.losses.rows.alpha_beta import alpha_beta
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl, skew_forward_kl, skew_reverse_kl, total_variation
from distill_jax.losses.rows.plackett_luce import plackett_luce
from distill_jax.losses.rows.truncated import truncated_kl
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_sum
from tests.objective.dense import dense_total, random_head, random_sampled, random_token_signal, random_topk, rel

B, T, D, V = 2, 9, 6, 23
TEMPERED = {"temperature": 2.0, "temper": "student"}
TERMS = {
    "soft_ce": RowTerm(loss=cross_entropy, target="signals/sampled"),
    "rs_kd": RowTerm(loss=forward_kl, target="signals/sampled"),
    "skew": RowTerm(loss=skew_forward_kl, target="signals/topk"),
    "skew_reverse": RowTerm(loss=skew_reverse_kl, target="signals/token"),
    "tv": RowTerm(loss=total_variation, target="signals/topk"),
    "abkd": RowTerm(loss=alpha_beta, target="teacher/main"),
    "akl": RowTerm(loss=adaptive_kl, target="signals/topk"),
    "pld": RowTerm(loss=plackett_luce, target="signals/topk"),
    "pld_full": RowTerm(loss=plackett_luce, target="teacher/main", kwargs={"temperature": 4.0}),
    "truncated": RowTerm(loss=truncated_kl, target="signals/topk"),
    "tempered": RowTerm(loss=forward_kl, target="signals/topk", kwargs=TEMPERED),
}


@pytest.mark.parametrize("dtype,close", [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
def test_equals_dense(dtype, close):
    """In bf16 the gradient of the logits is rounded before its products, so only nearly."""
    rng = np.random.default_rng(0)
    hidden = lambda d: jnp.asarray(rng.normal(size=(B, T, d)), dtype)
    sources = {"student/main": (hidden(D), random_head(rng, V, D, with_bias=True, real=V - 2)),
               "teacher/main": (hidden(5), random_head(rng, V + 3, 5, real=V - 2))}
    tokens = jnp.asarray(rng.integers(0, V - 2, (B, T)), jnp.int32)
    weights = {n: jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.7), jnp.float32) for n in TERMS}
    signals = {"topk": random_topk(rng, (B, T), V - 2, 5), "sampled": random_sampled(rng, (B, T), V - 2, 6),
               "token": random_token_signal(rng, (B, T))}
    kw = {"tokens": tokens, "signals": signals}
    lifted = lambda x, w: lift_sum(sources | {"student/main": x}, TERMS, w, chunk=8, **kw)[0]
    dense = lambda x, w: dense_total(sources | {"student/main": x}, TERMS, w, **kw)
    got, want = (jax.jit(jax.value_and_grad(f)) for f in (lifted, dense))
    for only in TERMS if dtype == jnp.float32 else ("",):
        chosen = {n: w * float(only in ("", n)) for n, w in weights.items()}
        pairs = zip(jax.tree.leaves(got(sources["student/main"], chosen)),
                    jax.tree.leaves(want(sources["student/main"], chosen)), strict=True)
        for a, b in pairs:
            assert np.linalg.norm(np.asarray(b, np.float32)) > 1e-3 and rel(a, b) < close, only
