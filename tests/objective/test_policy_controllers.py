"""Controllers of policy and preference terms: hand values, and that they reach the loss one update later."""

import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.tokens.measures import sequence_log_ratio
from distill_jax.losses.tokens.preference import kto
from distill_jax.losses.tokens.regularizers import negative_entropy
from distill_jax.objective.controllers import OWN, EntropyFloor, KLTarget, Watched
from distill_jax.objective.reduce import means
from distill_jax.objective.term import build_objective
from distill_jax.objective.tokens import TokenTerm
from tests.objective.test_tokens import batch_of, states


def run(controller, seen, key=OWN):
    state, values = controller.init(), []
    for step, x in enumerate(seen):
        state = controller.update(state, {key: jnp.float32(x)}, step)
        values.append(float(controller.value(state, step + 1)))
    return values


def test_entropy_floor_acts_below_its_target_only():
    """Given minus the entropy, as its own term measures it."""
    got = run(EntropyFloor(target=0.5, start=0.01, delta=0.005, high=0.02), [-0.4, -0.3, -0.2, -0.6, -0.4, np.nan])
    np.testing.assert_allclose(got, [0.015, 0.02, 0.02, 0.0, 0.02, 0.02], rtol=1e-5)


def test_kl_target_by_hand():
    got = run(KLTarget(target=0.1, start=1.0), [0.11, 1.0, 0.0, np.nan])
    np.testing.assert_allclose(got, np.cumprod([1.01, 1.02, 0.98, 1.0]), rtol=1e-5)


def test_watched_by_hand():
    np.testing.assert_allclose(run(Watched(watch="z", decay=0.5), [2.0, -4.0, np.nan], "z"), [1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="watches 'z'; measured"):
        run(Watched(watch="z"), [1.0])
    for bad in (lambda: Watched(watch="z", decay=1.0), lambda: EntropyFloor(start=2.0), lambda: KLTarget(target=0.0)):
        with pytest.raises(ValueError, match=r"decay is in|needs"):
            bad()


def test_ktos_z0_is_what_was_measured_an_update_ago():
    """A term of weight 0 measures the mean log ratio of sequences where a field says so; the loss takes it as z0."""
    batch = batch_of()
    objective = build_objective({
        "kto": TokenTerm(kto, target="reference/main", per="sequence", kwargs={"z0": Watched(watch="z0", low=-9.0)}),
        "z0": TokenTerm(sequence_log_ratio, target="reference/main", per="sequence", where="chosen", weight=0.0),
        "entropy": TokenTerm(negative_entropy, weight=EntropyFloor(target=9.0))})
    student, reference, heads = states(batch)
    sources = {"student/main": (student, heads[0]), "reference/main": (reference, heads[1])}
    state, seen = objective.init(), []
    for step in range(2):
        weights, moving = objective.weights(batch, step, state), objective.dynamic(step, state)
        _, metrics = objective.loss(sources, batch, weights, moving)
        seen.append((float(moving["kto"]["z0"]), float(means(metrics)["z0"]), float(means(metrics)["kto"])))
        state = objective.update(state, metrics, step)
    assert seen[0][0] == 0 and np.isclose(seen[1][0], seen[0][1]) and abs(seen[0][1]) > 0.01
    assert seen[0][2] != seen[1][2] and float(state["entropy.weight"]["coefficient"]) > 0
