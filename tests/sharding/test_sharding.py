"""Meshes, the sharding table, and activations named by model code."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distill_jax.sharding import Rules, batch_spec, constrain, make_mesh, param_shardings, use_rules
from distill_jax.sharding.rules import fit_spec

P = PartitionSpec


def test_mesh_takes_the_rest():
    mesh = make_mesh(data=2, fsdp=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_keeps_an_explicit_order_of_devices():
    devices = jax.devices()[3::-1]
    assert list(make_mesh(data=4, devices=devices).devices.flat) == devices


@pytest.mark.parametrize("sizes, words", [
    ({"data": 3}, ["data=3", "needs 3", "8"]),
    ({"data": -1, "tensor": 3}, ["tensor=3", "8 devices", "divided by 3"]),
    ({"data": -1, "fsdp": -1}, ["at most one"]),
    ({"tensor": 0}, ["positive"]),
])
def test_a_mesh_that_does_not_fit_names_the_counts(sizes, words):
    with pytest.raises(ValueError) as e:
        make_mesh(**sizes)
    assert all(w in str(e.value) for w in words), e.value


def test_uneven_dimensions_fall_back():
    sizes = {"data": 1, "fsdp": 2, "tensor": 4}
    assert fit_spec(P("tensor", "fsdp"), (8, 6), sizes) == P("tensor", "fsdp")
    assert fit_spec(P("tensor", "fsdp"), (6, 6), sizes) == P(None, "fsdp")
    assert fit_spec(P("tensor", "fsdp"), (8, 7), sizes) == P("tensor")
    assert fit_spec(P(("data", "fsdp"), None), (4, 3), sizes) == P("fsdp")
    assert fit_spec(P(("fsdp", "tensor")), (4,), sizes) == P()  # 4 is not divided by 2 x 4


def test_param_table():
    mesh = make_mesh(fsdp=4, tensor=2)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tree = {"embed": {"embedding": shape(64, 16)}, "final_norm": {"scale": shape(16)},
            "layers": {"attention": {"q": {"kernel": shape(3, 16, 8), "bias": shape(3, 8)}},
                       "mlp": {"down": {"kernel": shape(3, 9, 16)}}}}
    out = param_shardings(mesh, {"mu": tree})["mu"]  # a tree inside a tree, like Adam's moments
    assert out["embed"]["embedding"] == NamedSharding(mesh, P("tensor", "fsdp"))
    assert out["layers"]["attention"]["q"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert out["layers"]["attention"]["q"]["bias"].spec == P(None, "tensor")
    assert out["layers"]["mlp"]["down"]["kernel"].spec == P(None, None, "fsdp")  # 9 rows: not over tensor
    assert out["final_norm"]["scale"].spec == P()


def test_first_rule_wins():
    mesh = make_mesh(fsdp=-1)
    rules = Rules(params=[("special/kernel", P("fsdp")), ("kernel", P(None, "fsdp"))])
    shapes = {"special": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
              "other": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
              "scale": jax.ShapeDtypeStruct((8,), jnp.float32)}
    specs = jax.tree.map(lambda s: s.spec, param_shardings(mesh, shapes, rules))
    assert specs == {"special": {"kernel": P("fsdp")}, "other": {"kernel": P(None, "fsdp")}, "scale": P()}


def test_constrain():
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, "mlp") is x  # no mesh: nothing happens
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        assert jax.jit(lambda a: constrain(a, "mlp"))(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
        with use_rules(Rules(activations={"mlp": P(None, "tensor", None)})):
            assert jax.jit(lambda a: constrain(a, "mlp") + 0)(x).sharding.spec == P(None, "tensor")
        with pytest.raises(ValueError, match="unknown_name"):
            constrain(x, "unknown_name")


def test_constrain_leaves_mapped_axes_alone():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rows = batch_spec()
    body = jax.shard_map(lambda a: constrain(a, "hidden") * 2, mesh=mesh, in_specs=rows, out_specs=rows)
    x = jnp.arange(8.0 * 2 * 2).reshape(8, 2, 2)
    with jax.set_mesh(mesh):
        assert (jax.jit(body)(x) == 2 * x).all()


def test_an_axis_that_takes_a_part_of_a_torus_side(monkeypatch):
    """fsdp 16 on 4x8x8: `jax.make_mesh` refuses, the devices are split."""
    def refuse(*args, **kwargs):
        raise NotImplementedError("no assignment")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = make_mesh(data=2, fsdp=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
