"""The lifted loss over virtual devices: equal to one device, no collective of the head's size inside the loop."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax.core.platform import compiling_for
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_sum, lift_tokens
from tests.objective.dense import big_arrays, random_head, random_topk, rel

B, T, D, V = 4, 16, 8, 40

TERMS = {"ce": RowTerm(loss=cross_entropy), "kd": RowTerm(loss=forward_kl, target="signals/topk")}


def mesh_of(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def make(seed=0, b=B, t=T, vocab=V):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(b, t, D)), jnp.float32)
    head = random_head(rng, vocab, D, with_bias=True)
    weights = {n: jnp.asarray(rng.random((b, t)) * (rng.random((b, t)) < 0.7), jnp.float32) for n in TERMS}
    tokens = jnp.asarray(rng.integers(0, vocab, (b, t)), jnp.int32)
    return (hidden, head), weights, tokens, {"topk": random_topk(rng, (b, t), vocab, 4)}


def step(mesh, chunk=8):
    def fn(source, weights, tokens, signals):
        return lift_sum({"student/main": source}, TERMS, weights, tokens=tokens, signals=signals, mesh=mesh,
                        chunk=chunk)

    return jax.jit(jax.value_and_grad(fn, has_aux=True))


def place(mesh, case):
    """Hidden states and fields by rows, the head by vocabulary and width: as a training step has them."""
    (hidden, head), *fields = case
    rows = NamedSharding(mesh, P(tuple(a for a in mesh.axis_names if a != "tensor")))
    put = lambda s: lambda x: jax.device_put(x, s)
    spec = P(*(a if a in mesh.axis_names else None for a in ("tensor", "fsdp")))
    kernel, bias = put(NamedSharding(mesh, spec))(head.kernel), put(NamedSharding(mesh, P()))(head.bias)
    return (put(rows)(hidden), dataclasses.replace(head, kernel=kernel, bias=bias)), *jax.tree.map(put(rows), fields)


@pytest.mark.parametrize(("shape", "names"), [((4, 2), ("data", "tensor")), ((2, 2, 2), ("data", "fsdp", "tensor"))])
def test_mesh_equals_one_device(shape, names):
    case = make()
    want = step(None)(*case)
    mesh = mesh_of(shape, names)
    got = step(mesh)(*place(mesh, case))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(b) > 0 and rel(a, b) < 1e-6


def test_as_it_is_compiled_for_tpus():
    """The head's gradient is moved before it is scattered: the parts of its width lie apart in memory."""
    case, mesh = make(b=8), mesh_of((2, 4), ("data", "fsdp"))
    want = step(None)(*case)
    with compiling_for("tpu"):
        traced = step(mesh).lower(*place(mesh, case))
    assert f"tensor<4x{V}x{D // 4}xf32>" in traced.as_text(), "parts of the width first"
    got = traced.compile()(*place(mesh, case))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(b) > 0 and rel(a, b) < 1e-6


def test_mesh_that_does_not_divide():
    """Rows, tokens and vocabulary that no axis divides."""
    case = make(b=3, t=9, vocab=41)
    want, got = step(None)(*case), step(mesh_of((2, 2, 2), ("data", "fsdp", "tensor")))(*case)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rel(a, b) < 1e-6


def test_lift_tokens_on_a_mesh():
    (hidden, head), _, tokens, _ = make()
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(B, T)), jnp.float32)

    def grads(mesh):
        def fn(source):
            logp, ent = lift_tokens(*source, tokens, mesh=mesh, chunk=8)
            return jnp.sum(weights * jnp.exp(logp) * ent)
        return jax.jit(jax.value_and_grad(fn))((hidden, head))

    want, got = grads(None), grads(mesh_of((2, 2, 2), ("data", "fsdp", "tensor")))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rel(a, b) < 1e-6


def test_no_array_of_a_devices_logits():
    """Inside `shard_map` shapes are those of one device: not even its own share of the logits is ever whole."""
    b, t, vocab, chunk = 8, 64, 20 * D, 8  # the global hidden states are smaller than one device's logits
    mesh = mesh_of((2, 2, 2), ("data", "fsdp", "tensor"))
    program = step(mesh, chunk)
    case = make(b=b, t=t, vocab=vocab)
    assert not big_arrays(program, *case, size=b * t * vocab // mesh.size)
    assert big_arrays(program, *case, size=chunk * vocab), "the walk must reach the chunk's logits"


COLLECTIVE = re.compile(r"= (\(?[a-z0-9]+\[.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
                        r"(?:-start)?\(")


def collectives(hlo, inside_loops):
    """Sizes of the collectives in (or outside) the computations reachable from while bodies of an HLO text."""
    bodies, current = {}, None
    for line in hlo.splitlines():
        start = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if start and " = " not in line:
            current = start.group(1)
            bodies[current] = []
        elif current:
            bodies[current].append(line)
    called = lambda line: re.findall(r"(?:body|condition|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line)
    loops = {c for lines in bodies.values() for line in lines if re.search(r" while\(", line) for c in called(line)}
    reached, todo = set(), list(loops)
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [c for line in bodies.get(name, ()) for c in called(line)]
    assert loops, "no while loop in the HLO: the parser or the program has changed"
    sizes = []
    for name, lines in bodies.items():
        if (name in reached) == inside_loops:
            for line in lines:
                if m := COLLECTIVE.search(line):
                    shapes = re.findall(r"\[([\d,]*)\]", m.group(1))
                    sizes += [int(np.prod([int(x) for x in s.split(",") if x] or [1])) for s in shapes]
    return sizes


def test_no_collective_of_the_head_inside_the_loop():
    """Without a tensor axis; with one, see `test_lift_vocabulary`."""
    mesh = mesh_of((4, 2), ("data", "fsdp"))
    hlo = step(mesh).lower(*place(mesh, make(b=8))).compile().as_text()
    assert collectives(hlo, inside_loops=True) == [], "the loop is free of communication altogether"
    outside = collectives(hlo, inside_loops=False)
    assert max(outside) == V * D, "the head is gathered once before it"
    assert sum(n >= V * D // 2 for n in outside) <= 3, f"gather, reduce-scatter, sum over data: {outside}"


def test_the_hlo_reader_sees_a_collective_in_a_loop():
    """What automatic sharding does to the same sum, and what the reader must be able to find."""
    mesh = mesh_of((4, 2), ("data", "tensor"))
    (hidden, head), *_ = place(mesh, make())

    def fn(hidden, kernel):
        body = lambda acc, h: (acc + jnp.einsum("bv,bd->vd", jax.nn.softmax(h @ kernel.T), h), None)
        return jax.lax.scan(body, jnp.zeros_like(kernel), jnp.swapaxes(hidden, 0, 1))[0]

    hlo = jax.jit(fn, out_shardings=NamedSharding(mesh, P())).lower(hidden, head.kernel).compile().as_text()
    assert max(collectives(hlo, inside_loops=True), default=0) >= V * D // 2, "one shard of the head, every turn"
