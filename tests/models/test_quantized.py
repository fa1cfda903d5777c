"""`models.quantized`: against NumPy and qwix's own training, straight-through gradients, meshes, remat, adapters."""

import dataclasses
import importlib.util
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.core.platform import compiling_for
from distill_jax.models.layers import Dense
from distill_jax.models.product import product
from distill_jax.models.quantized import MATMULS, calibration, matmul
from distill_jax.models.remat import REMAT
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.recipe import Student
from distill_jax.sharding import batch_spec, make_mesh, param_shardings
from tests.models.common import PLAIN, SPARSE, make, tokens

EIGHT = [name for name, how in MATMULS.items() if how]
TYPES = {"int8": (None, 127.0), "e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
FORWARD = {"int8": "int8", "int8_dx": "int8", "fp8": "e4m3", "fp8_dx": "e4m3"}
BACKWARD = {"int8_dx": ("int8", "int8"), "fp8_dx": ("e5m2", "e4m3")}


def rounded(x, axis, kind):
    """x in float64 as numbers of the format times scales along `axis`, without JAX."""
    dtype, top = TYPES[kind]
    scale = (np.abs(x).max(axis, keepdims=True).astype(np.float32) / np.float32(top))
    scale = np.where(scale == 0, np.float32(1), scale)
    at = x.astype(np.float32) / scale
    values = np.rint(at) if dtype is None else at.astype(dtype)
    return values.astype(np.float64) * scale.astype(np.float64)


def reference(x, kernel, kinds):
    return rounded(x, -1, kinds[0]) @ rounded(kernel, 0, kinds[1])


def arrays(dtype=np.float32, shape=(2, 5, 24), out=12, seed=0):
    """Tokens and outputs of very different sizes, one token of zeros, and a gradient."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal((*shape[:-1], 1)))
    x[0, 0] = 0
    kernel = rng.standard_normal((shape[-1], out)) * np.exp(rng.standard_normal(out))
    grad = rng.standard_normal((*shape[:-1], out)) * np.exp(rng.standard_normal((*shape[:-1], 1)))
    return [jnp.asarray(a, dtype) for a in (x, kernel, grad)]


def close(got, want, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("name", EIGHT)
def test_against_numpy(name, dtype, tolerance):
    """Values; the states' gradient by the straight-through formula, or with what comes back rounded too."""
    x, kernel, grad = arrays(dtype)
    wide = [np.asarray(a, np.float64) for a in (x, kernel, grad)]
    got, back = jax.vjp(lambda x, k: matmul(x, k, name), x, kernel)
    dx, d_kernel = back(grad)
    assert got.dtype == dx.dtype == d_kernel.dtype == dtype
    close(got, reference(wide[0], wide[1], (FORWARD[name], FORWARD[name])), tolerance)
    assert np.all(got[0, 0] == 0)
    close(dx, reference(wide[2], wide[1].T, BACKWARD[name]) if name in BACKWARD else wide[2] @ wide[1].T, tolerance)
    close(d_kernel, np.einsum("bti,bto->io", wide[0], wide[2]), tolerance)


def test_rounds_less_than_it_could():
    """Relative error of a product of normal numbers: int8 about 1%, fp8 below 4%."""
    x, kernel = (jnp.asarray(np.random.default_rng(i).standard_normal(s), jnp.float32)
                 for i, s in enumerate([(1, 64, 256), (256, 64)]))
    want = product(x, kernel)
    error = {n: float(jnp.linalg.norm(matmul(x, kernel, n) - want) / jnp.linalg.norm(want)) for n in ("int8", "fp8")}
    assert 0.005 < error["int8"] < 0.015 < error["fp8"] < 0.04, error


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_none(name, value):
    x, kernel, _ = arrays()
    y = matmul(x.at[0, 3, 7].set(value), kernel, name)
    assert not np.isfinite(y[0, 3]).any() and np.isfinite(y[0, 4]).all()


@pytest.mark.parametrize("name", EIGHT)
def test_as_qwix_trains(name):
    """qwix's quantised training of a flax layer, by interception: the same values and, where only the forward pass is
    quantised, gradients. (Backward it scales by the forward pass's kernel, not by one of its own: no equality.)"""
    x, kernel, grad = arrays()
    operands = MATMULS[name].operands
    scale = calibration(operands)
    rules = [qwix.QtRule(weight_qtype=operands, act_qtype=operands, act_calibration_method=scale,
                         weight_calibration_method=scale)]
    layer = qwix.quantize_model(nn.Dense(kernel.shape[1], use_bias=False), qwix.QtProvider(rules))
    with jax.numpy_dtype_promotion("standard"):
        want, back = jax.vjp(lambda x, k: layer.apply({"params": {"kernel": k}}, x), x, kernel)
        wanted = back(grad)
    got, back = jax.vjp(lambda x, k: matmul(x, k, name), x, kernel)
    close(got, np.asarray(want))
    if name not in BACKWARD:
        jax.tree.map(close, back(grad), jax.tree.map(np.asarray, wanted))


@pytest.mark.parametrize("spec_x, spec_k", [
    (PartitionSpec("fsdp"), PartitionSpec("fsdp")), (PartitionSpec(None, None, "tensor"), PartitionSpec("tensor")),
    (PartitionSpec("fsdp"), PartitionSpec(None, "tensor")), (PartitionSpec(None, "context"), PartitionSpec()),
], ids=["fsdp", "tensor_in", "tensor_out", "context"])
@pytest.mark.parametrize("name", EIGHT)
def test_sharded_is_unsharded(name, spec_x, spec_k):
    """Scales are those of whole rows, also where `tensor` cuts the contracted dimension: int8 to the bit."""
    axis = next(a for s in (*spec_k, *spec_x) if (a := s))
    mesh = make_mesh(**{axis: 8})
    x, kernel, grad = arrays(shape=(8, 8, 32), out=16)

    def run(x, kernel, grad):
        y, back = jax.vjp(lambda x, k: matmul(x, k, name), x, kernel)
        return y, *back(grad)

    want = jax.jit(run)(x, kernel, grad)
    kept = lambda spec: PartitionSpec(*(a if a == axis else None for a in spec))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*(jax.device_put(a, NamedSharding(mesh, kept(s)))
                             for a, s in ((x, spec_x), (kernel, spec_k), (grad, PartitionSpec()))))
    for i, (a, b) in enumerate(zip(got, want)):
        exact = name.startswith("int8") and (i == 0 or (i == 1 and name == "int8_dx"))
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 1e-6 * np.abs(b).max())


def loss_of(model, ids):
    return lambda p: jnp.mean(jnp.square(model.apply({"params": p}, ids, method="hidden").hidden.astype(jnp.float32)))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 4, "data": 2}, {"fsdp": 2, "tensor": 2, "context": 2}])
def test_model_on_a_mesh(sizes):
    """Loss and gradient: other orders of sums turn a few roundings, no more."""
    config = dataclasses.replace(PLAIN, num_kv_heads=4)
    model, params = make(config, matmul="int8_dx")
    ids, mesh = tokens(8, 16), make_mesh(**sizes)
    loss, grads = jax.jit(jax.value_and_grad(loss_of(model, ids)))(params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(mesh, params))
        where = jax.device_put(ids, NamedSharding(mesh, batch_spec()))
        other, found = jax.jit(jax.value_and_grad(loss_of(model, where)))(placed)
    np.testing.assert_allclose(other, loss, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads)):
        assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)


def test_kernels_travel_in_eight_bits():
    """Under fsdp the gathers of kernels are of int8: a quarter of float32, half of bfloat16."""
    model = Transformer(dataclasses.replace(PLAIN, num_layers=8), matmul="int8_dx", remat="dots")
    mesh, ids = make_mesh(fsdp=8), tokens(8, 16)
    with jax.set_mesh(mesh):
        params = init_params(model, jax.random.key(0), mesh=mesh)
        text = jax.jit(jax.grad(loss_of(model, ids))).lower(params).compile().as_text()
    gathers = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    kernels = [g for g in gathers if any(f"[{a},{b}]" in g for a, b in ((32, 32), (32, 16), (32, 48), (48, 32)))]
    assert len(kernels) >= 7 and all("s8[" in g for g in kernels), gathers


def eight_bit_products(jaxpr):
    """Shapes of the second operands of all products of 8 bits."""
    out = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.dtype.itemsize == 1:
            out.append(eqn.invars[1].aval.shape)
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(sub, "jaxpr", sub)
            out += eight_bit_products(inner) if hasattr(inner, "eqns") else []
    return out


def test_only_kernels_of_layers():
    """Seven products of a layer; not the head, nor attention, nor an adapter."""
    model, params = make(PLAIN, matmul="int8")
    jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, tokens(1, 8)))(params)
    assert sorted(eight_bit_products(jaxpr.jaxpr)) == sorted(
        [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)])


def test_adapters_stay_as_they_are():
    x, kernel, _ = arrays()
    a, b = (jnp.asarray(np.random.default_rng(0).standard_normal(s), jnp.float32) for s in ((24, 3), (3, 12)))
    layer = Dense(12, False, 0.02, "int8")
    run = lambda p: layer.apply({"params": p}, x)
    params = {"kernel": kernel, "lora_a": a, "lora_b": b}
    close(run(params), np.asarray(matmul(x, kernel, "int8") + product(product(x, a), b)))
    grads = jax.grad(lambda p: jnp.sum(run(p)))(params)
    flat = x.reshape(-1, 24)
    close(grads["lora_b"], np.asarray((flat @ a).sum(0)[:, None] * np.ones((1, 12))), 1e-5)


@pytest.mark.parametrize("name", ["int8", "fp8_dx"])
def test_remat_changes_neither_gradients_nor_what_is_kept(name):
    """All policies, unrolled and scanned; residuals are no larger than in full precision (counted as a GPU keeps them).
    """
    config, ids = dataclasses.replace(PLAIN, num_layers=3), tokens(2, 32)
    params = make(config)[1]
    gradient = lambda **kw: jax.jit(jax.grad(loss_of(Transformer(config, **kw), ids)))(params)
    want = gradient(matmul=name)
    for policy in REMAT:
        got = gradient(matmul=name, remat=policy)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), policy
        sizes = {m: kept(Transformer(config, dtype=jnp.bfloat16, remat=policy, matmul=m), params, ids)
                 for m in ("full", name)}
        assert sizes[name] <= sizes["full"], (policy, sizes)


def kept(model, params, ids):
    """Bytes that the forward pass leaves to the backward pass."""
    with compiling_for("gpu"):
        back = jax.eval_shape(lambda p: jax.vjp(loss_of(model, ids), p)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(back))


@pytest.mark.parametrize("config, name, says", [
    (PLAIN, "int4", "matmul 'int4' is unknown; known: full, int8, fp8, int8_dx, fp8_dx"),
    (SPARSE, "int8", "matmul='int8' is for dense models, this one has 8 experts a layer; use matmul='full'"),
])
def test_refused(config, name, says):
    with pytest.raises(ValueError, match=says):
        init_params(Transformer(config, matmul=name), jax.random.key(0))


def test_without_qwix(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "qwix" else found(name, *a))
    with pytest.raises(ValueError, match=r"matmul='fp8' needs qwix: pip install 'distill_jax\[quantized\]', or use"):
        init_params(Transformer(PLAIN, matmul="fp8"), jax.random.key(0))
    init_params(Transformer(PLAIN), jax.random.key(0))


def test_a_recipe_takes_these_names():
    from distill_jax.core import spec

    assert spec.build(Student, {"model": "x", "matmul": "int8_dx"}).matmul == "int8_dx"
    assert all(Student(model="x", matmul=name).matmul == name for name in MATMULS)
    with pytest.raises(ValueError, match=r"got 'int9', expected one of \['full', 'int8', 'fp8', 'int8_dx', 'fp8_dx'\]"):
        spec.build(Student, {"model": "x", "matmul": "int9"})
