"""Selective KD through the objective: the same gradient for any micro-batches, and a threshold that moves."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.logprob import entropy
from distill_jax.losses.rows.selective import Selective, uncertain
from distill_jax.objective.controllers import EntropyQuantile
from distill_jax.objective.reduce import means
from distill_jax.objective.term import Term, build_objective
from tests.objective.dense import random_head, rel
from tests.objective.test_term import D, V, make_batch, run

THRESHOLD = EntropyQuantile(share=0.5, start=2.4)
OBJECTIVE = build_objective({
    "kl": Term(Selective(loss=forward_kl, share=0.5), target="signals/topk", kwargs={"threshold": THRESHOLD}),
    "uncertain": Term(uncertain, target="signals/topk", weight=0.0, kwargs={"threshold": THRESHOLD})})


def test_share_threshold_and_micro_batches():
    rng = np.random.default_rng(1)
    source = jnp.asarray(2 * rng.normal(size=(4, 12, D)), jnp.float32), random_head(rng, V, D)
    batch, state = make_batch(), OBJECTIVE.init()
    whole, cut = run(OBJECTIVE, source, batch, state=state), run(OBJECTIVE, source, batch, state=state, rows=1)
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        assert rel(a, b) < 1e-6
    on = np.asarray(OBJECTIVE.weights(batch, 0, state).masks["kl"])[:, 1:] > 0
    h = np.asarray(entropy(source[1].logits(source[0])[:, :-1].reshape(-1, V))).reshape(on.shape)
    share = (h[on] > 2.4).mean()
    assert 0.1 < share < 0.9 and np.isclose(means(whole[1])["uncertain"], share, rtol=1e-6)
    taken = np.pad((h > 2.4) & on, ((0, 0), (0, 1)))
    assert not np.any(np.asarray(whole[2])[~taken]) and np.all(np.any(np.asarray(whole[2])[taken], -1))
    after = OBJECTIVE.update(state, whole[1], 0)
    assert after["kl.threshold"] == after["uncertain.threshold"]
    assert np.isclose(after["kl.threshold"], 2.4 * np.exp(0.2 * (share - 0.5)), rtol=1e-5)
