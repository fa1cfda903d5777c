"""Adapters: nothing at the start, the same merged and beside the model, where they lie, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import tree
from distill_jax.core.batch import TopK
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.models.config import ModelConfig
from distill_jax.models.lora import TARGETS, Base, Lora, from_json, joined, merge, to_json
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh, param_shardings
from distill_jax.train.feed import place_global
from distill_jax.train.optim import AdamW
from distill_jax.train.state import create_state
from distill_jax.train.step import StepConfig, make_step
from tests.train.tiny import CONFIG as TINY
from tests.train.tiny import Synthetic

CONFIG = ModelConfig(vocab_size=32, hidden_size=32, mlp_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
SPEC = Lora(rank=4, alpha=6.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(32, size=(2, 12)))


@pytest.fixture(scope="module")
def model():
    model = Transformer(CONFIG)
    return model, init_params(model, jax.random.key(0)), SPEC.init(init_params(model, jax.random.key(0)),
                                                                   jax.random.key(1))


def moved(adapters):
    return jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapters)


def test_starts_as_the_base(model):
    """B = 0: logits to the bit. Shapes by hand; A within 1/sqrt(in)."""
    model, params, adapters = model
    logits = jax.jit(lambda p: model.apply({"params": p}, TOKENS))
    np.testing.assert_array_equal(logits(Base(params=params, scale=SPEC.scale).join(adapters)), logits(params))
    shapes = {path: x.shape for path, x in tree.paths(adapters)}
    assert len(shapes) == 2 * len(TARGETS)
    assert shapes["layers/attention/k/lora_a"] == (2, 32, 4) and shapes["layers/attention/k/lora_b"] == (2, 4, 16)
    assert shapes["layers/mlp/down/lora_a"] == (2, 64, 4)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters))
    down = adapters["layers"]["mlp"]["down"]["lora_a"]
    assert 0.9 / 8 < float(jnp.max(jnp.abs(down))) <= 1 / 8


def test_merged_and_unmerged_are_equal(model):
    model, params, adapters = model
    adapters = moved(adapters)
    logits = jax.jit(lambda p: model.apply({"params": p}, TOKENS))
    merged = merge(params, adapters, SPEC.scale)
    beside = logits(Base(params=params, scale=SPEC.scale).join(adapters))
    np.testing.assert_allclose(beside, logits(merged), atol=2e-5)
    assert float(jnp.max(jnp.abs(beside - logits(params)))) > 1e-2
    up = {name: np.asarray(adapters["layers"]["mlp"]["up"][name], np.float64) for name in ("lora_a", "lora_b")}
    want = np.asarray(params["layers"]["mlp"]["up"]["kernel"][1]) + 1.5 * up["lora_a"][1] @ up["lora_b"][1]
    np.testing.assert_allclose(merged["layers"]["mlp"]["up"]["kernel"][1], want, atol=1e-6)
    half = merge(tree.cast(params, jnp.bfloat16), adapters, SPEC.scale)
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(jnp.bfloat16)}


def test_lie_like_their_kernels(model):
    """A is cut where the kernel's rows are, B where its columns are."""
    mesh = make_mesh(fsdp=2, tensor=4)
    found = {path: tuple(s.spec) for path, s in tree.paths(param_shardings(mesh, model[2]))}
    assert found["layers/attention/q/lora_a"] == (None, "fsdp")
    assert found["layers/attention/q/lora_b"] == (None, None, "tensor")
    assert found["layers/mlp/down/lora_a"] == (None, "tensor")
    assert found["layers/mlp/down/lora_b"] == (None, None, "fsdp")


@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_trains_the_adapters_alone(devices):
    """State, gradient and moments are the adapters'; the loss falls; on eight devices it is that of one."""
    mesh = make_mesh(fsdp=-1, devices=jax.devices()[:devices])
    net, lora = Transformer(dataclasses.replace(TINY, init_std=0.3)), Lora(rank=4)
    params = init_params(net, jax.random.key(0), mesh=mesh)
    make = lambda rng: lora.init(params, rng)
    placed = param_shardings(mesh, jax.eval_shape(make, jax.random.key(1)))
    adapters = jax.jit(make, out_shardings=placed)(jax.random.key(1))
    config = StepConfig(objective=build_objective({"ce": Term(cross_entropy)}), models={"student": net}, mesh=mesh,
                        optimizers={"student": AdamW(peak_lr=1e-2, warmup=2).build(30)})
    state = create_state({"student": adapters}, config.optimizers, mesh=mesh)
    assert tree.nbytes(state.opt_state) < 2.1 * tree.nbytes(adapters)
    step, source, losses = make_step(config, state), Synthetic(), []
    frozen = {"base/student": Base(params=params, scale=lora.scale)}
    for i in range(12):
        state, metrics = step(state, frozen, place_global(source.batch(i), mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    SEEN[devices] = losses
    if len(SEEN) == 2:
        np.testing.assert_allclose(SEEN[8][:6], SEEN[1][:6], rtol=1e-4)


SEEN: dict[int, list[float]] = {}


def test_other_providers_stay_as_they_are():
    plain = {"kernel": jnp.ones(2)}
    assert joined({"teacher": plain, "signals/a": TopK}) == {"teacher": plain, "signals/a": TopK}


def test_json_and_back():
    assert from_json(to_json(SPEC, "some/model", 7)) == (SPEC, "some/model", 7)
    with pytest.raises(ValueError, match=r"adapter.json has no 'alpha'"):
        from_json({"rank": 4})


@pytest.mark.parametrize(("bad", "says"), [({"rank": 0}, "rank >= 1"), ({"targets": ("q", "query")}, "'query'"),
                                           ({"targets": ()}, "must be some of q, k, v")])
def test_refuses(bad, says):
    with pytest.raises(ValueError, match=says):
        Lora(**bad)
