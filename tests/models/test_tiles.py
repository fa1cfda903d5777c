"""Mixtures in tiles: against every expert for every token and against grouped products, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.core.platform import compiling_for
from distill_jax.models import moe, tiles
from distill_jax.models.moe import every_expert, grouped, route
from distill_jax.sharding import make_mesh
from distill_jax.sharding.experts import map_experts

D, F = 6, 5


def parts(n=13, experts=4, top_k=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(n), 5)
    shapes = {"gate": (experts, D, F), "up": (experts, D, F), "down": (experts, F, D)}
    kernels = {name: jax.random.normal(k, s).astype(dtype) for (name, s), k in zip(shapes.items(), keys)}
    x = jax.random.normal(keys[3], (n, D))
    _, shares, ids = route(x, jax.random.normal(keys[4], (D, experts)), top_k, True)
    return x.astype(dtype), ids, shares.astype(dtype), kernels


def gradients(fn, x, ids, shares, kernels, **kwargs):
    """-> (value, gradients of x, shares and kernels) of a weighted sum of the outputs."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32)

    def total(x, shares, kernels):
        out = fn(x, ids, shares, kernels, activation=jax.nn.silu, **kwargs)
        return jnp.sum(weights * out.astype(jnp.float32)), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(x, shares, kernels)
    return out, grads


close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5))


def in_rows(monkeypatch, rows):
    monkeypatch.setattr(moe, "rows_of", lambda copies: rows)


@pytest.mark.parametrize("rows", [1, 4, 64])  # 64: one tile is larger than all copies
@pytest.mark.parametrize("top_k", [1, 3])
def test_tiles_are_every_expert_and_grouped_products(monkeypatch, rows, top_k):
    in_rows(monkeypatch, rows)
    args = parts(top_k=top_k)
    got = gradients(grouped, *args)
    close(got, gradients(every_expert, *args))
    with compiling_for("tpu"):
        close(got, gradients(grouped, *args))


def test_all_to_one_expert(monkeypatch):
    """The others get gradients of exactly zero."""
    in_rows(monkeypatch, 4)
    x, _, shares, kernels = parts(top_k=1)
    ids = jnp.full((x.shape[0], 1), 2, jnp.int32)
    got = gradients(grouped, x, ids, shares, kernels)
    close(got, gradients(every_expert, x, ids, shares, kernels))
    for g in got[1][2].values():
        assert np.all(g[jnp.array([0, 1, 3])] == 0) and np.any(g[2] != 0)


def test_no_copy_for_these_experts():
    out, grads = gradients(grouped, *parts(), first=4)
    assert all(np.all(a == 0) for a in jax.tree.leaves((out, grads)))


def test_the_loop_ends_with_the_last_tile_used():
    """A tile beyond it would read the matrices of an expert that is not there: with one copy here, one turn."""
    sizes, order = jnp.array([0, 1, 0], jnp.int32), jnp.arange(20, dtype=jnp.int32)
    turns = tiles._over_tiles(lambda n, *_: n + 1, jnp.int32(0), (10, 2), order, sizes, 4)
    assert turns == 1


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(0, 20), min_size=5, max_size=5), rows=st.sampled_from([1, 4, 16]))
def test_every_copy_is_in_one_tile_of_its_expert(sizes, rows):
    """Group sizes of all kinds, with as many copies for experts elsewhere; padding has numbers beyond the end."""
    copies = 100 + sum(sizes) % 2
    order = np.random.default_rng(sum(sizes)).permutation(copies).astype(np.int32)
    expert_of = np.full(copies, -1)
    expert_of[order[:sum(sizes)]] = np.repeat(np.arange(5), sizes)

    def turn(state, expert, copies, tokens):
        seen, count, number = state
        return seen.at[copies].set(expert, mode="drop"), count.at[copies].add(1, mode="drop"), number + 1

    start = (jnp.full(copies, -1, jnp.int32), jnp.zeros(copies, jnp.int32), jnp.int32(0))
    seen, count, number = tiles._over_tiles(turn, start, (copies, 1), jnp.asarray(order),
                                            jnp.asarray(sizes, jnp.int32), rows)
    np.testing.assert_array_equal(seen, expert_of)
    np.testing.assert_array_equal(count, expert_of >= 0)
    assert number == sum(-(-n // rows) for n in sizes)


EXPERTS, TOKENS = 6, 10
BOTH = [jax.jit(partial(gradients, fn)) for fn in (grouped, every_expert)]


@settings(max_examples=30)
@given(st.lists(st.permutations(range(EXPERTS)), min_size=TOKENS, max_size=TOKENS))
def test_whatever_the_router_says(picked):
    x, _, shares, kernels = parts(TOKENS, EXPERTS, 3)
    ids = jnp.asarray(np.array(picked)[:, :3], jnp.int32)
    close(*(fn(x, ids, shares, kernels) for fn in BOTH))


def test_sums_are_float32_in_half_precision(monkeypatch):
    """600 tiles of one row for one expert: sums in bfloat16 would stop growing at a few hundred."""
    in_rows(monkeypatch, 1)
    x, ids, shares = jnp.ones((600, D), jnp.bfloat16), jnp.zeros((600, 1), jnp.int32), jnp.ones((600, 1), jnp.bfloat16)
    kernels = {"gate": jnp.ones((1, D, F), jnp.bfloat16), "up": jnp.ones((1, D, F), jnp.bfloat16),
               "down": jnp.ones((1, F, D), jnp.bfloat16)}
    loss = lambda k: jnp.sum(grouped(x, ids, shares, k, activation=jax.nn.relu).astype(jnp.float32))
    got = jax.grad(loss)(kernels)["down"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), 600 * D * D, rtol=2**-8)


def test_layers_in_a_scan_under_remat():
    x, ids, shares, kernels = parts()
    stack = jax.tree.map(lambda k: jnp.stack([k, k[::-1], 0.5 * k]), kernels)

    def loss(remat, x, stack):
        layer = lambda x, k: (x + grouped(x, ids, shares, k, activation=jax.nn.silu), None)
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, stack)[0] ** 2)

    got, want = (jax.jit(jax.value_and_grad(partial(loss, remat), argnums=(0, 1)))(x, stack) for remat in (True, False))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, want)


@pytest.mark.parametrize("busy", [0, 5])
def test_owners_with_unequal_work(busy):
    """Eight owners of one expert each, all tokens for the same two of them: loops of other lengths on each device."""
    x, _, shares, kernels = parts(16, 8)
    ids = jnp.tile(jnp.array([[busy, busy + 1]], jnp.int32), (16, 1))
    rows = lambda a: a.reshape(8, 2, -1)

    def run(x, ids, shares, kernels, activation):
        fn = partial(grouped, activation=activation, experts=8)
        return map_experts(fn, rows(x), rows(ids), rows(shares), kernels).reshape(16, D)

    want = gradients(every_expert, x, ids, shares, kernels)
    close(gradients(run, x, ids, shares, kernels), want)
    with jax.set_mesh(make_mesh(expert=8)):
        close(jax.device_get(gradients(run, x, ids, shares, kernels)), jax.device_get(want))


def test_nothing_of_the_size_of_the_inner_states_is_kept_or_made():
    """Temporaries of forward and backward pass: less than a quarter of one array [N k, F]."""
    n, experts, top_k, d, f = 2048, 8, 2, 8, 512
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    kernels = {"gate": like(experts, d, f), "up": like(experts, d, f), "down": like(experts, f, d)}

    def loss(x, shares, kernels, ids):
        return jnp.sum(grouped(x, ids, shares, kernels, activation=jax.nn.silu) ** 2)

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
        like(n, d), like(n, top_k), kernels, jax.ShapeDtypeStruct((n, top_k), jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * (n * top_k * f) / 4


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_only_tpus_have_grouped_products(platform):
    x, ids, shares, kernels = parts()
    with compiling_for(platform):
        text = str(jax.make_jaxpr(partial(grouped, activation=jax.nn.silu))(x, ids, shares, kernels))
    assert ("ragged_dot" in text) == (platform == "tpu")


def test_rows_of_a_tile():
    assert [tiles.rows_of(n) for n in (0.1, 50, 100, 1e6)] == [16, 32, 64, 64]
    with compiling_for("gpu"):
        assert [tiles.rows_of(n) for n in (1, 1024, 8192)] == [64, 512, 1024]
