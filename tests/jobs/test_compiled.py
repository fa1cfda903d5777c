"""A recipe's step compiled on abstract arrays: it is the step that trains, and its traffic is what the HLO says."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.shapes import SHAPES, step_recipe
from distill_jax.jobs.compiled import compile_step
from distill_jax.jobs.hardware import parse
from distill_jax.models.lora import Lora
from distill_jax.recipe import MeshShape
from distill_jax.recipe_file import override
from distill_jax.sharding import make_mesh
from distill_jax.sharding.hlo import collectives


def test_step_of_a_recipe_compiles_for_virtual_devices():
    recipe = step_recipe("tiny", rows=8, length=32, mesh=MeshShape(fsdp=4), precision="float32")
    c = compile_step(recipe, recipe.stages[0], parse("cpu:4"), {"student": SHAPES["tiny"]})
    params = SHAPES["tiny"].num_params
    assert params / 4 * 4 <= c.hbm["parameters"] < 1.05 * params + 8192, "a quarter each; vectors are whole"
    assert 2 * c.hbm["parameters"] <= c.hbm["optimiser"] <= 2 * c.hbm["parameters"] + 64
    assert c.temporary > 0 and c.arguments + c.temporary <= c.peak
    assert c.sent > 0 and {o.group for o in c.collectives if o.sent} == {4}


def test_collectives_of_a_loop_are_counted_every_time():
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    put = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at(*spec))

    def f(x, w):
        def body(x, w):
            return jax.lax.with_sharding_constraint(x @ w, at(None, None)), None
        return jax.lax.scan(body, x, w)[0]

    text = jax.jit(f).lower(put((8, 16), None, None), put((5, 16, 16), None, None, "fsdp")).compile().as_text()
    found = [c for c in collectives(text) if c.bytes >= 8 * 16 * 4]
    assert sum(c.trips for c in found) in (5, 10) and {c.group for c in found} == {4}
    one = found[0]
    assert one.sent == one.bytes * 0.75 * one.trips * (2 if one.kind == "all-reduce" else 1)


def test_forms_of_collectives_in_the_text_of_accelerators():
    text = """HloModule m

ENTRY %main (p: f32[4]) -> f32[4] {
  %g = ((bf16[4,8], bf16[2,8]), (bf16[32,8], bf16[16,8])) all-gather-start(%a, %b), replica_groups=mesh['a'=8] {'a'}
  %rs = f32[2,8]{1,0} reduce-scatter(%c), replica_groups=[2,4]<=[8], dimensions={0}
  %ar = f32[10]{0} all-reduce(%d), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""
    got = [(c.kind, c.bytes, c.group) for c in collectives(text)]
    assert got == [("all-gather", (32 + 16) * 8 * 2, 8), ("reduce-scatter", 2 * 8 * 4 * 4, 4), ("all-reduce", 40, 2)]


def compiled(r, on="cpu:4"):
    return compile_step(r, r.stages[0], parse(on), {"student": SHAPES["tiny"]})


def test_adapters_are_trained_beside_a_frozen_base():
    r = step_recipe("tiny", rows=8, length=32, mesh=MeshShape(fsdp=4), precision="bfloat16")
    stage = r.stages[0]
    student = replace(stage.providers["student"], config=None, model="m", lora=Lora(rank=2, targets=("q", "down")))
    whole, c = compiled(r), compiled(replace(r, stages=(replace(stage, providers={"student": student}),)))
    d, f, q, layers = 64, 128, 64, 2
    adapters = layers * 2 * (d + q + f + d)
    assert adapters <= c.hbm["optimiser"] / 2 < 4 * adapters, "moments of adapters only, cut where fsdp divides"
    assert 0.5 * whole.hbm["parameters"] < c.hbm["parameters"] < 0.5 * whole.hbm["parameters"] + 4 * adapters + 4096
    assert c.temporary < whole.temporary and c.sent < whole.sent, "no gradient of the base"


def test_stored_hidden_states_bring_the_teacher_s_head():
    r = override(step_recipe("tiny", rows=8, length=32, mesh=MeshShape(fsdp=4)), "source.signals=[hidden]")
    c = compiled(override(r, "terms.kl.target=signals/hidden"))
    plain = compiled(step_recipe("tiny", rows=8, length=32, mesh=MeshShape(fsdp=4)))
    head = 2 * SHAPES["tiny"].vocab_size * 64 // 4
    states = 8 // 4 * 32 * (2 * 64 + 4 + 1)
    assert c.hbm["parameters"] == plain.hbm["parameters"] + head
    topk = 8 // 4 * 32 * (64 * 8 + 1)
    assert c.hbm["batch"] == plain.hbm["batch"] - topk + states


def test_a_batch_is_cut_over_context_as_a_run_cuts_it():
    rows = step_recipe("tiny", rows=8, length=64, mesh=MeshShape(fsdp=4))
    both = step_recipe("tiny", rows=8, length=64, mesh=MeshShape(fsdp=2, context=2))
    a, b = compiled(rows), compiled(both)
    assert abs(a.hbm["batch"] - b.hbm["batch"]) < 64, "as many tokens a device"
    assert {c.group for c in b.collectives if c.bytes > 4096} == {2}
