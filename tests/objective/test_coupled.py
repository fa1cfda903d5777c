"""Coupled terms: how a batch may be cut, weights, layers, views, and what gets a gradient. Without models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax.core.batch import Batch
from distill_jax.core.roles import THINK
from distill_jax.core.schedules import Linear
from distill_jax.data.views import without_thinking
from distill_jax.losses.groups.hidden import cosine_distance, linear_cka, mean_squared_error, relation_kl
from distill_jax.losses.groups.sinkhorn import sinkhorn_kd
from distill_jax.losses.groups.transport import sequence_transport
from distill_jax.objective.coupled import CoupledTerm
from distill_jax.objective.term import build_objective
from tests.objective.dense import big_arrays, random_head, rel
from tests.train.tiny import VOCAB, Synthetic, pack

B, T, D = 8, 24, 6
ROWWISE = {
    "cosine": CoupledTerm(cosine_distance, layers=((0, 1), ("final", "final"))),
    "mse": CoupledTerm(mean_squared_error, layers=(("embedding", "embedding"),), per="sequence", on=(THINK,)),
    "relation": CoupledTerm(relation_kl, kwargs={"heads": 2}, weight=Linear(start=0.0, stop=2.0, steps=2)),
    "transport": CoupledTerm(sequence_transport, target="teacher/plain", per="sequence", kwargs={"iterations": 5}),
}
GROUPS = {
    "sinkhorn": CoupledTerm(sinkhorn_kd, scope="global", kwargs={"iterations": 5}),
    "signal": CoupledTerm(sinkhorn_kd, target="signals/topk", scope="global",
                          kwargs={"temperature": 1.0, "iterations": 5}),
    "cka": CoupledTerm(linear_cka, layers=((0, 1),), scope="global"),
}


def batch_of(step=0, batch=None) -> Batch:
    batch = batch or Synthetic().batch(step)
    return Batch(views={"main": batch.main, "plain": without_thinking(batch.main)}, signals=batch.signals)


def states(batch, seed=0):
    """States that are functions of the token and its position, so that they move with it when packing changes.
    -> (student: the differentiated part, teacher's layers, heads)"""
    rng = np.random.default_rng(seed)
    table = {k: rng.normal(size=(VOCAB, 12, D)).astype(np.float32) for k in (
        "student/final", "student/0", "student/embedding", "teacher/final", "teacher/1", "teacher/embedding")}
    of = lambda k, view: jnp.asarray(table[k][np.asarray(batch.views[view].tokens),
                                              np.asarray(batch.views[view].positions)])
    student = {x: of(f"student/{x}", "main") for x in ("final", "0", "embedding")}
    teacher = {x: of(f"teacher/{x}", "main") for x in ("final", "1", "embedding")}
    heads = random_head(rng, VOCAB, D), random_head(rng, VOCAB, D)
    return student, teacher | {"plain": of("teacher/final", "plain")}, heads


def total(objective, batch, student, teacher, heads, weights, mesh=None):
    sources = {"student/main": (student["final"], heads[0]), "teacher/main": (teacher["final"], heads[1]),
               "teacher/plain": (teacher["plain"], heads[1])}
    layers = {"student/main": {0: student["0"], "embedding": student["embedding"]},
              "teacher/main": {1: teacher["1"], "embedding": teacher["embedding"]}}
    return objective.loss(sources, batch, weights, objective.dynamic(1), layers=layers, mesh=mesh)


def evaluate(terms, batch=None, mesh=None, parts=1):
    """(total, metrics, gradients of the student's states in the order of rows, head gradient)."""
    objective, batch = build_objective(terms), batch_of(batch=batch)
    student, teacher, heads = states(batch)
    weights = objective.weights(batch, 1)

    def fn(student, head, teacher, other, batch, weights):
        return total(objective, batch, student, teacher, (head, other), weights, mesh)

    step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))
    put = (lambda x: x) if mesh is None else lambda x: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    out, rows = [], batch.main.tokens.shape[0] // parts
    for i in range(parts):
        cut = lambda tree, i=i: jax.tree.map(lambda x: put(x[i * rows:(i + 1) * rows]), tree)
        out.append(step(cut(student), heads[0], cut(teacher), heads[1], cut(batch), cut(weights)))
    (value, metrics), (grads, head) = jax.tree.map(lambda *x: sum(x), *out) if parts > 1 else out[0]
    if parts > 1:
        grads = jax.tree.map(lambda *x: jnp.concatenate(x), *[o[1][0] for o in out])
    return float(value), metrics, grads, head


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=jax.devices()[:int(np.prod(shape))],
                         axis_types=(AxisType.Auto,) * 3)


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree))))


@pytest.fixture(scope="module")
def whole():
    return evaluate(ROWWISE)


@pytest.mark.parametrize("cut", [{"parts": 4}, {"mesh": mesh_of(2, 1, 2)}])
def test_row_wise_couplings_do_not_depend_on_micro_batches_and_devices(whole, cut):
    value, metrics, grads, _ = evaluate(ROWWISE, **cut)
    assert value > 0.1 and np.isclose(value, whole[0], rtol=1e-5)
    for x in grads:
        assert norm(whole[2][x]) > 1e-4 and rel(grads[x], whole[2][x]) < 1e-5, x
    for name in ROWWISE:
        np.testing.assert_allclose(metrics[name].sum, whole[1][name].sum, rtol=1e-5, atol=1e-6)


def test_row_wise_couplings_do_not_depend_on_packing(whole):
    rows = [[d] for row in Synthetic().documents(0) for d in row]
    value, metrics, grads, _ = evaluate(ROWWISE, batch=pack(rows, 12))
    assert np.isclose(value, whole[0], rtol=1e-5)
    for x in grads:
        assert np.isclose(norm(grads[x]), norm(whole[2][x]), rtol=1e-4)
    for name in ROWWISE:
        np.testing.assert_allclose(metrics[name].mean, whole[1][name].mean, rtol=1e-5)


def test_groups_over_all_devices_equal_one_device():
    want = evaluate(GROUPS)
    got = evaluate(GROUPS, mesh=mesh_of(2, 1, 1))
    wide = evaluate(GROUPS, mesh=mesh_of(1, 2, 2))
    for other in (got, wide):
        assert np.isclose(other[0], want[0], rtol=1e-5) and want[0] > 0.1
        assert rel(other[2]["final"], want[2]["final"]) < 1e-4 and rel(other[2]["0"], want[2]["0"]) < 1e-4
        assert norm(want[3]) > 1e-3 and rel(other[3].kernel, want[3].kernel) < 1e-4


def test_scope_device_is_the_weighted_mean_over_the_devices_own_groups():
    """As two micro-batches of the same rows; a group of all rows is another loss."""
    terms = {"sinkhorn": CoupledTerm(sinkhorn_kd, kwargs={"iterations": 5})}
    devices, parts = evaluate(terms, mesh=mesh_of(2, 1, 1)), evaluate(terms, parts=2)
    assert np.isclose(devices[0], parts[0], rtol=1e-5) and rel(devices[2]["final"], parts[2]["final"]) < 1e-4
    assert abs(devices[0] - evaluate(terms)[0]) > 1e-5


def test_no_array_of_all_logits():
    """Tokens are picked before logits are made: nothing as large as a quarter of [B,T,V]."""
    objective, batch = build_objective({"sinkhorn": CoupledTerm(sinkhorn_kd, kwargs={"tokens": 8})}), batch_of()
    student, teacher, heads = states(batch)
    weights = objective.weights(batch, 0)
    fn = jax.grad(lambda s: total(objective, batch, s, teacher, heads, weights)[0])
    assert not big_arrays(fn, student, size=B * T * VOCAB // 4)
    assert big_arrays(fn, student, size=8 * VOCAB), "the walk must reach the picked logits"


def test_teacher_gets_no_gradient_and_nothing_is_nan_without_supervised_tokens():
    objective, batch = build_objective(ROWWISE | GROUPS), batch_of()
    student, teacher, heads = states(batch)
    empty = jax.tree.map(lambda x: x, batch)
    for view in empty.views.values():
        object.__setattr__(view, "weights", jnp.zeros(view.tokens.shape, jnp.float32))
    weights = objective.weights(empty, 1)
    fn = lambda s, t, h: total(objective, empty, s, t, h, weights)[0]
    value, grads = jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2)))(student, teacher, heads)
    assert value == 0 and all(not np.any(x) for x in jax.tree.leaves(grads))
    weights = objective.weights(batch_of(), 1)
    moved = jax.jit(jax.grad(lambda t, h: total(objective, batch_of(), student, t, (heads[0], h), weights)[0],
                             argnums=(0, 1)))(teacher, heads[1])
    assert all(not np.any(x) for x in jax.tree.leaves(moved))


def test_a_layer_that_nobody_made_and_a_schedule_without_value():
    objective, batch = build_objective({"a": CoupledTerm(cosine_distance, layers=((5, "final"),))}), batch_of()
    weights = objective.weights(batch, 0)
    with pytest.raises(ValueError, match="no layer 5 of 'student/main'"):
        total(objective, batch, *states(batch), weights)
    eps = {"eps": Linear(start=1.0, stop=0.1, steps=3)}
    objective = build_objective({"a": CoupledTerm(sequence_transport, kwargs=eps)})
    student, teacher, heads = states(batch)
    sources = {"student/main": (student["final"], heads[0]), "teacher/main": (teacher["final"], heads[1])}
    with pytest.raises(ValueError, match=r"no value for \['eps'\]"):
        objective.loss(sources, batch, weights)
    assert objective.loss(sources, batch, weights, objective.dynamic(0))[0] > 0
