"""Token terms in a training step: what was rewarded gets more likely, and micro-batches change nothing."""

import jax
import numpy as np
import pytest

from distill_jax.losses.tokens.policy import gspo, ppo_clip
from distill_jax.losses.tokens.regularizers import kl, negative_log_likelihood
from distill_jax.objective.reduce import means
from distill_jax.objective.tokens import TokenTerm, policy_metrics
from distill_jax.train.optim import AdamW
from distill_jax.train.step import make_step
from tests.objective.test_tokens import batch_of
from tests.train.tiny import setup

TERMS = {
    "ppo": TokenTerm(ppo_clip, kwargs={"old": "current"}),
    "gspo": TokenTerm(gspo, per="sequence", weight=0.5, kwargs={"old": "current"}),
    "kl": TokenTerm(kl, target="signals/token", weight=1e-3), **policy_metrics(old="current"),
    **{side: TokenTerm(negative_log_likelihood, where=side, weight=0.0) for side in ("chosen", "rejected")}}


def updates(count, micro_batches=1):
    """(parameters, metrics of every update); the rewarded sequences are the chosen ones."""
    batch = batch_of()
    fields = batch.main.fields
    fields["advantages"], fields["rejected"] = 2 * fields["chosen"] - 1, 1 - fields["chosen"]
    config, state = setup(TERMS, micro_batches=micro_batches, optim=AdamW(peak_lr=1e-2, warmup=1))
    step, seen = make_step(config, state), []
    for _ in range(count):
        state, metrics = step(state, {}, batch)
        seen.append({k: float(v) for k, v in means(metrics["terms"]).items()} | {"norm": float(metrics["grad_norm"])})
    return jax.tree.map(np.asarray, state.params), seen


@pytest.fixture(scope="module")
def trained():
    return updates(6)


def test_what_was_rewarded_gets_more_likely(trained):
    """With ratio 1 the loss's value is -mean A whatever the policy does: likelihoods show which way it moved."""
    _, seen = trained
    assert all(np.isfinite(list(m.values())).all() and m["norm"] > 0 for m in seen)
    assert all(m["mean_ratio"] == 1 and m["clip_fraction"] == 0 for m in seen)
    margins = [m["rejected"] - m["chosen"] for m in seen]
    assert margins == sorted(margins) and margins[-1] > margins[0] + 0.1


def test_micro_batches_change_nothing(trained):
    params, seen = updates(6, micro_batches=4)
    assert np.isclose(seen[0]["norm"], trained[1][0]["norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(trained[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
