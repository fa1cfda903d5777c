"""Experts: routing by hand, grouped products against every expert for every token, values and gradients."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.models.config import ModelConfig, MoE
from distill_jax.models.moe import every_expert, grouped, route, statistics
from distill_jax.sharding import make_mesh, param_shardings
from tests.models.common import SPARSE, make, tokens


def parts(n=13, d=6, f=5, experts=4, top_k=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    kernels = {name: jax.random.normal(k, s) for name, k, s in zip(
        ("gate", "up", "down"), keys, ((experts, d, f), (experts, d, f), (experts, f, d)))}
    x = jax.random.normal(keys[3], (n, d))
    _, shares, ids = route(x, jax.random.normal(keys[4], (d, experts)), top_k, True)
    return x, ids, shares, kernels


def test_routing_by_hand():
    x = jnp.eye(3)[None]
    router = jnp.log(jnp.array([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6], [0.2, 0.4, 0.25, 0.15]]))
    probs, shares, ids = route(x, router, 2, True)
    np.testing.assert_allclose(probs[0, 1], [0.1, 0.1, 0.2, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(ids[0], [[0, 1], [3, 2], [1, 2]])
    np.testing.assert_allclose(shares[0], [[0.625, 0.375], [0.75, 0.25], [0.4 / 0.65, 0.25 / 0.65]], rtol=1e-6)
    np.testing.assert_allclose(route(x, router, 2, False)[1][0, 0], [0.5, 0.3], rtol=1e-6)
    said = statistics(probs, ids, jnp.array([[True, True, False]]))  # the third token is padding
    np.testing.assert_array_equal(said.counts, [1, 1, 1, 1])
    np.testing.assert_allclose(said.probs, [0.6, 0.4, 0.3, 0.7], rtol=1e-6)
    assert said.tokens == 2


def test_the_router_is_float32_in_a_half_precision_model():
    x = jnp.ones((1, 1, 64), jnp.bfloat16)
    router = jnp.zeros((64, 2)).at[:, 1].set(1e-4)  # sums to 0.0064: lost in bfloat16 next to 1
    router = router.at[0].add(1.0)
    probs, _, ids = route(x, router, 1, True)
    assert probs.dtype == jnp.float32 and ids[0, 0, 0] == 1


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_grouped_is_every_expert(top_k):
    """Values and all gradients, float64."""
    with jax.enable_x64(True):
        args = parts(top_k=top_k)
        x, ids, shares, kernels = jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, args)
        weights = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))

        def total(fn, x, shares, kernels):
            return jnp.sum(weights * fn(x, ids, shares, kernels, activation=jax.nn.silu))

        got, want = (jax.jit(jax.value_and_grad(partial(total, fn), argnums=(0, 1, 2)))(x, shares, kernels)
                     for fn in (grouped, every_expert))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), got, want)


def test_an_expert_without_tokens_and_one_with_all():
    x, _, shares, kernels = parts()
    ids = jnp.tile(jnp.array([[3, 1]], jnp.int32), (x.shape[0], 1))
    run = lambda fn: fn(x, ids, shares, kernels, activation=jax.nn.silu)
    np.testing.assert_allclose(run(grouped), run(every_expert), rtol=1e-5, atol=1e-5)


def test_parts_of_the_experts_add_up():
    """What two owners of two experts each compute is the whole; neither says anything of the other's."""
    x, ids, shares, kernels = parts()
    run = lambda first, k: grouped(x, ids, shares, k, first, activation=jax.nn.silu)
    halves = [run(first, {name: k[first:first + 2] for name, k in kernels.items()}) for first in (0, 2)]
    np.testing.assert_allclose(halves[0] + halves[1], run(0, kernels), rtol=1e-5, atol=1e-5)
    assert not np.allclose(halves[0], run(0, kernels))


def test_padding_changes_nothing_and_is_not_counted():
    model, params = make(SPARSE)
    t = tokens(2, 12)
    segments = jnp.asarray(np.array([[1] * 12, [1] * 7 + [0] * 5]), jnp.int32)
    run = jax.jit(lambda t: model.apply({"params": params}, t, segment_ids=segments, method="hidden"))
    one, other = run(t), run(t.at[1, 7:].set(5))
    np.testing.assert_array_equal(one.hidden[segments == 1], other.hidden[segments == 1])
    jax.tree.map(np.testing.assert_array_equal, one.routing, other.routing)
    assert one.routing.counts.shape == (2, 8)
    np.testing.assert_array_equal(one.routing.tokens, [19, 19])
    np.testing.assert_allclose(one.routing.counts.sum(-1), 2 * 19)
    np.testing.assert_allclose(one.routing.probs.sum(-1), 19, rtol=1e-5)


def test_sizes_are_those_of_the_parameters():
    _, params = make(SPARSE)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert SPARSE.num_params == count(params)
    experts = {k: v for k, v in params["layers"]["moe"].items() if k != "router"}
    assert SPARSE.expert_params == count(experts)
    assert SPARSE.num_active_params == SPARSE.num_params - count(experts) * 6 // 8
    dense = dataclasses.replace(SPARSE, moe=None, mlp_size=32)  # two experts of 16 cost what one MLP of 32 does
    router = 2.0 * 2 * 32 * 8
    assert SPARSE.flops_per_token(10) == dense.flops_per_token(10) + router


@pytest.mark.parametrize("fields", [{"experts": 4, "top_k": 5, "size": 8}, {"experts": 0, "top_k": 1, "size": 8},
                                    {"experts": 4, "top_k": 1, "size": 0}])
def test_impossible_mixtures_are_refused(fields):
    with pytest.raises(ValueError, match="top_k <= experts, got"):
        MoE(**fields)


def test_biases_are_refused():
    with pytest.raises(ValueError, match="mlp_bias"):
        ModelConfig(**{**{f.name: getattr(SPARSE, f.name) for f in dataclasses.fields(SPARSE)}, "mlp_bias": True})


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_that_the_mesh_does_not_divide(rows):
    """One row is whole on every device: owners then add up, and nothing is scattered. Four are cut: as in training."""
    mesh = make_mesh(expert=2, fsdp=2, tensor=2)
    model, params = make(SPARSE)
    t = tokens(rows, 5)
    want = jax.jit(lambda p: model.apply({"params": p}, t))(params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(mesh, params))
        got = jax.jit(lambda p: model.apply({"params": p}, t))(placed)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
