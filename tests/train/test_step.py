"""The step: it learns, it skips what is not finite, frozen providers stay, its counts are right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import tree
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.models.transformer import init_params
from distill_jax.objective.controllers import TAIDSchedule
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh
from distill_jax.train.flops import Flops
from distill_jax.train.state import create_state
from distill_jax.train.step import make_evaluation, make_step
from tests.train.tiny import CE, CE_AND_KD, CONFIG, OPTIM, Synthetic, setup


def copy(state):
    return jax.tree.map(lambda x: np.array(x), state)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_learns_and_skips_what_is_not_finite():
    """Loss falls; a poisoned step changes nothing but the counters, and is the same as if it had not been there."""
    terms = {"ce": Term(cross_entropy, weight=TAIDSchedule(steps=10))}
    config, state = setup(terms)
    step, source, poisoned = make_step(config, state), Synthetic(), Synthetic(poison=(3,))
    losses = []
    for i in range(12):
        before = copy(state) if i == 3 else None
        state, metrics = step(state, {}, poisoned.batch(i))
        losses.append(float(metrics["terms"]["ce"].mean))
        if i == 3:
            after = copy(state)
            assert not metrics["ok"] and after.skipped == 1 and after.step == 4
            for name in ("params", "opt_state", "controllers", "rng"):
                assert same(getattr(before, name), getattr(after, name)), name
        else:
            assert metrics["ok"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    assert source.batch(3).main.weights.max() == 1.0


def test_frozen_teacher_is_a_source_and_stays():
    """Online KD against itself: zero loss and gradient; against another teacher both are positive."""
    terms = {"kd": Term(forward_kl, target="teacher/main")}
    config, state = setup(CE)
    models = {**config.models, "teacher": config.models["student"]}
    config = dataclasses.replace(config, objective=build_objective(terms), models=models)
    step, batch = make_step(config, state), Synthetic().batch(0)
    same_teacher = jax.tree.map(jnp.copy, state.params["student"])
    state, metrics = step(state, {"teacher": same_teacher}, batch)
    assert abs(float(metrics["loss"])) < 1e-6 and float(metrics["grad_norm"]) < 1e-5
    other = init_params(config.models["student"], jax.random.key(9))
    other_before = copy(other)
    state, metrics = step(state, {"teacher": other}, batch)
    assert float(metrics["loss"]) > 1e-4 and float(metrics["grad_norm"]) > 1e-3
    assert same(other_before, other)


def test_counts_and_flops_by_hand():
    """Metrics of a batch: tokens, supervised tokens, retained mass, and FLOPs against a loop over tokens."""
    flops = {"student": Flops.of(CONFIG)}
    config, state = setup(CE_AND_KD, flops=flops, schedules={"student": OPTIM.schedule(100)})
    batch = Synthetic().batch(0)
    stream = batch.main
    _, metrics = make_step(config, state)(state, {}, batch)
    real = stream.segment_ids > 0
    supervised = real & (stream.weights > 0) & np.isin(stream.roles, (4, 5))
    assert metrics["tokens"] == real.sum() and metrics["supervised"] == supervised.sum()
    mass, count = jax.device_get(metrics["retained"]["topk"])
    assert count == supervised.sum()
    np.testing.assert_allclose(mass / count, 0.9, rtol=1e-5)
    np.testing.assert_allclose(metrics["lr"]["student"], 1.5e-3, rtol=1e-6)
    D, F, L, H = 16, 32, 2, 16
    per_token = L * (D * H * 2 + D * 8 * 2 + 3 * D * F)
    macs = per_token * real.sum() + D * 48 * supervised.sum() + 2 * L * H * (stream.positions[real] + 1).sum()
    np.testing.assert_allclose(metrics["flops"], 6.0 * macs, rtol=1e-6)


def test_sliding_layers_count_their_window():
    flops = Flops(matrices=0, head=0, full=0, sliding=5, window=3, passes=1)
    stream = Synthetic().batch(0).main
    real = stream.segment_ids > 0
    expected = 2 * 2 * 5 * np.minimum(stream.positions[real] + 1, 3).sum()
    np.testing.assert_allclose(flops.count(stream, jnp.zeros(real.shape, bool)), expected, rtol=1e-6)


def test_evaluation_is_the_loss_of_the_step():
    config, state = setup(CE_AND_KD)
    batch = Synthetic().batch(0)
    sums = make_evaluation(config)(state.params, {}, batch, state.step, state.controllers)
    _, metrics = make_step(config, state)(state, {}, batch)
    for name in CE_AND_KD:
        np.testing.assert_allclose(sums[name].sum, metrics["terms"][name].sum, rtol=1e-5)
        np.testing.assert_array_equal(sums[name].count, metrics["terms"][name].count)


def test_rows_that_do_not_divide_are_refused():
    config, state = setup(micro_batches=3)
    with pytest.raises(ValueError, match="8 rows cannot be cut into micro_batches=3"):
        make_step(config, state)(state, {}, Synthetic().batch(0))


def test_unknown_provider_is_refused():
    config, _ = setup()
    with pytest.raises(ValueError, match="teacher"):
        dataclasses.replace(config, objective=build_objective({"kd": Term(forward_kl, target="teacher/main")}))


def test_sharded_steps_follow_the_single_device():
    """Ten updates on data x fsdp x tensor with micro-batches stay close to one device: same data, same losses."""
    curves = []
    for mesh, parts in ((None, 1), (make_mesh(2, 2, 2), 2)):
        config, state = setup(CE_AND_KD, mesh, micro_batches=parts)
        step, losses = make_step(config, state), []
        for i in range(10):
            state, metrics = step(state, {}, Synthetic().batch(i))
            losses.append(float(metrics["loss"]))
        curves.append(losses)
        assert all(x.sharding == y.sharding for x, y in zip(
            jax.tree.leaves(state), jax.tree.leaves(create_state(state.params, config.optimizers, mesh=config.mesh)),
            strict=True))
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
    assert tree.count(state.params) > 0
