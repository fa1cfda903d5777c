"""A mixture in the training step: the same loss and gradients on every layout, what is sent, the balance loss."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.core.tree import global_norm
from distill_jax.models.config import AttentionConfig, MoE
from distill_jax.models.moe import Routing
from distill_jax.sharding import batch_spec, make_mesh, param_shardings
from distill_jax.train.balance import balance_loss, load
from distill_jax.train.step import make_gradient
from tests.train.tiny import CE, CONFIG, Synthetic, setup

WIDTH, INNER, EXPERTS, LENGTH = 16, 12, 8, 24
SPARSE = dataclasses.replace(CONFIG, model_type="qwen3_moe", tied=False, attention=AttentionConfig(qk_norm=True),
                             init_std=0.3, moe=MoE(experts=EXPERTS, top_k=2, size=INNER, balance=0.5))
LAYOUTS = {"one": {}, "expert": {"expert": 8}, "three": {"expert": 2, "fsdp": 2, "tensor": 2}}


def compiled(sizes, config=SPARSE, micro_batches=1):
    """-> (the compiled gradient of a layout, its arguments)"""
    mesh = make_mesh(**sizes) if sizes else make_mesh(devices=jax.devices()[:1])
    step, state = setup(CE, mesh, config=config, micro_batches=micro_batches)
    spec = NamedSharding(mesh, batch_spec())
    batch = jax.tree.map(lambda x: jax.device_put(x, spec), Synthetic(seq_len=LENGTH).batch(0))
    shardings = param_shardings(mesh, state.params)
    gradient = jax.jit(make_gradient(step, shardings))
    args = (state.params, {}, batch, jnp.int32(0), {})
    if not sizes:
        return gradient.lower(*args).compile(), args
    with jax.set_mesh(mesh):
        return gradient.lower(*args).compile(), args


@pytest.fixture(scope="module")
def layouts():
    return {name: compiled(sizes) for name, sizes in LAYOUTS.items()}


@pytest.fixture(scope="module")
def results(layouts):
    return {name: jax.device_get(fn(*args)) for name, (fn, args) in layouts.items()}


def same(got, want, tolerance=1e-6):
    (grads, metrics), (grads0, metrics0) = got, want
    np.testing.assert_allclose(metrics["loss"], metrics0["loss"], rtol=tolerance)
    np.testing.assert_allclose(metrics["experts"]["student/main"]["balance"],
                               metrics0["experts"]["student/main"]["balance"], rtol=tolerance)
    gap = global_norm(jax.tree.map(lambda a, b: jnp.asarray(a - b), grads, grads0))
    assert gap <= tolerance * global_norm(grads0), gap
    moe = lambda g: g["student"]["layers"]["moe"]
    for name in moe(grads0):  # each part by itself: none may hide behind the embedding
        a, b = moe(grads)[name]["kernel"], moe(grads0)[name]["kernel"]
        assert np.linalg.norm(a - b) <= 5e-6 * np.linalg.norm(b) > 0, name


@pytest.mark.parametrize("layout", ["expert", "three"])
def test_layouts_agree(results, layout):
    same(results[layout], results["one"])
    assert results[layout][1]["experts"]["student/main"]["load"] == results["one"][1]["experts"]["student/main"]["load"]


def gathered(text):
    """Shapes of all results of all-gathers."""
    out = []
    for line in text.splitlines():
        if re.search(r"= .* all-gather(-start)?\(", line):
            left = line.split(" all-gather")[0]
            out += [tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", left)]
    return out


def kernels(shapes, inner=INNER):
    """Experts' matrices among shapes: how many matrices each holds."""
    return [int(np.prod(s[:-2])) for s in shapes if s[-2:] in ((WIDTH, inner), (inner, WIDTH))]


def test_experts_stay_where_they_are(layouts):
    """Tokens are gathered over `expert`, matrices never: only over `fsdp`, and then those of one owner and layer."""
    shapes = gathered(layouts["expert"][0].as_text())
    assert kernels(shapes) == [] and (8, LENGTH, WIDTH) in shapes, shapes
    shapes = gathered(layouts["three"][0].as_text())
    found = kernels(shapes, INNER // 2)
    assert found and max(found) <= EXPERTS // 2 and not kernels(shapes), shapes


def test_a_gathered_kernel_would_be_seen():
    mesh = make_mesh(expert=8)
    split, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("expert",), ()))
    fn = jax.jit(lambda k: k * 2, in_shardings=split, out_shardings=whole)
    assert kernels(gathered(fn.lower(jnp.zeros((EXPERTS, WIDTH, INNER))).compile().as_text())) == [EXPERTS]


def test_parameters_and_moments_are_cut_by_expert(layouts):
    params = layouts["three"][1][0]["student"]["layers"]["moe"]
    assert params["gate"]["kernel"].sharding.spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert params["down"]["kernel"].sharding.spec == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert params["down"]["kernel"].addressable_shards[0].data.shape == (2, 4, INNER // 2, WIDTH // 2)


def test_balance_by_hand():
    even = Routing(counts=jnp.full((2, 4), 6.0), probs=jnp.full((2, 4), 3.0), tokens=jnp.full(2, 12.0))
    moe = MoE(experts=4, top_k=2, size=1)
    np.testing.assert_allclose(balance_loss(even, moe), 2.0, rtol=1e-6)  # top_k
    all_to_two = Routing(counts=jnp.array([[3.0, 3, 0, 0]]), probs=jnp.array([[1.5, 1.5, 0, 0]]),
                         tokens=jnp.array([3.0]))
    np.testing.assert_allclose(balance_loss(all_to_two, moe), 4.0, rtol=1e-6)
    assert load(even.counts) == 1 and load(all_to_two.counts) == 2
    nothing = jax.tree.map(jnp.zeros_like, even)
    assert balance_loss(nothing, moe) == 0 and np.isfinite(load(nothing.counts))


def test_the_loss_has_the_balance_and_it_moves_the_router(layouts, results):
    fn, args = compiled({}, dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, balance=0.0)))
    grads, metrics = jax.device_get(fn(*args))
    with_grads, with_metrics = results["one"]
    balance = with_metrics["experts"]["student/main"]["balance"]
    assert balance > 2  # more than top_k: not even
    np.testing.assert_allclose(with_metrics["loss"], metrics["loss"] + 0.5 * balance, rtol=1e-6)
    router = lambda g: g["student"]["layers"]["moe"]["router"]["kernel"]
    assert np.linalg.norm(router(with_grads) - router(grads)) > 1e-3
    np.testing.assert_allclose(with_grads["student"]["lm_head"]["kernel"], grads["student"]["lm_head"]["kernel"],
                               atol=1e-6)


@pytest.mark.slow
def test_micro_batches_on_a_mesh_are_those_of_one_device():
    cut = lambda sizes: (lambda fn, args: jax.device_get(fn(*args)))(*compiled(sizes, micro_batches=2))
    same(cut({"expert": 2, "tensor": 2, "data": 2}), cut({}))
