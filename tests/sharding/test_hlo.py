"""What a training step sends between eight devices, for every layout: the exact set of collectives, read from the HLO.

Arrays under `SMALL` bytes (norms, counts, sums of losses) are left out. On the CPU gradients are all-reduced and cut;
the compilers for GPU and TPU make a reduce-scatter of the two. They also add up products before one all-reduce where
the CPU has three (q, k, v) or two (gate, up).
"""

from collections import Counter

import jax
import numpy as np
import pytest

from distill_jax.core.batch import Batch, Stream
from distill_jax.core.roles import ANSWER
from distill_jax.core.tree import map_with_path
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.sharding import make_mesh, param_shardings
from distill_jax.sharding.hlo import collectives
from distill_jax.train.feed import place_global
from distill_jax.train.step import make_step
from tests.train.tiny import setup

B, T, V, D, F, L = 16, 48, 496, 64, 160, 13  # L: more than are unrolled
H, K, HEAD = 8, 8, 16
Q = H * HEAD
CONFIG = ModelConfig(vocab_size=V, hidden_size=D, mlp_size=F, num_layers=L, num_heads=H, num_kv_heads=K, head_dim=HEAD,
                     context_length=T, attention=AttentionConfig(qkv_bias=False))
SMALL = 4096
KERNELS = [(D, Q), (D, Q), (D, Q), (Q, D), (D, F), (D, F), (F, D)]


def compiled(sizes, micro_batches=1):
    mesh = make_mesh(devices=None, **sizes)
    config, state = setup(mesh=mesh, config=CONFIG, micro_batches=micro_batches)
    one = np.ones((B, T), np.int32)
    weights = np.ones((B, T), np.float32)
    weights[:, 0] = 0
    batch = Batch(views={"main": Stream(
        tokens=one, positions=np.broadcast_to(np.arange(T, dtype=np.int32), one.shape).copy(), segment_ids=one,
        roles=one * int(ANSWER), step_ids=one * 0, weights=weights, row_ids=one * 0)})
    step = make_step(config, state)
    with jax.set_mesh(mesh):
        return step.__wrapped__.lower(state, {}, place_global(batch, mesh)).compile(), state


def sent(text, of=SMALL):
    """{(kind, group, "step" | "layers" | ..., dimensions sorted, for compilers transpose): how many arrays}."""
    out = Counter()
    for c in collectives(text):
        pieces = c.kind == "all-to-all"  # one array in as many pieces as devices
        size = c.bytes / (1 if pieces else len(c.shapes))
        for shape in c.shapes[:1] if pieces else c.shapes:
            if 4 * np.prod(shape) * (c.group if c.kind in ("reduce-scatter", "all-to-all") else 1) >= of:
                out[c.kind, c.group, where(c.loops), tuple(sorted(shape))] += 1
        assert size > 0
    return out


def where(loops):
    assert None not in loops, f"something is sent within the loss's loop over chunks: loops {loops}"
    return {(): "step", (L,): "layers", (2,): "micro-batch", (2, L): "layers"}[loops]


def times(n, kind, group, place, shapes):
    return Counter({(kind, group, place, s): n * c for s, c in Counter(tuple(sorted(s)) for s in shapes).items()})


STATES = (B, T, D)
LAYOUTS = {
    "data 8": ({"data": 8}, times(1, "all-reduce", 8, "layers", KERNELS)
               + times(2, "all-reduce", 8, "step", [(V, D)])),  # embedding and (tied) head: two sums of the gradient
    "fsdp 8": ({"fsdp": 8}, times(1, "all-gather", 8, "step", [(V, D)])  # the head, whole for the loss
               + times(1, "reduce-scatter", 8, "step", [(V, D // 8)])  # and its gradient
               + times(2, "all-gather", 8, "layers", KERNELS)  # forward and backward, a layer at a time
               + times(1, "all-reduce", 8, "layers", KERNELS)
               + times(2, "all-to-all", 8, "step", [(2, T, D // 8)])),  # looked-up states, and their gradients
    "tensor 8": ({"tensor": 8},  # the head is never gathered: the vocabulary is cut
                 times(2, "all-reduce", 8, "step", [STATES])  # embedding forward, and the sum of its gradient
                 + times(1, "all-reduce", 8, "step", [(B * T, D)])  # the loss's gradient of the states
                 + times(7, "all-reduce", 8, "layers", [(B * T, D)])),  # o, down; backward q, k, v, gate, up
    "context 8": ({"context": 8}, times(1, "all-reduce", 8, "layers", KERNELS)
                  + times(2, "all-reduce", 8, "step", [(V, D)])
                  + times(4, "all-gather", 8, "layers", [(B, K, T, HEAD)])  # K and V, again for the backward
                  + times(2, "reduce-scatter", 8, "layers", [(B, K, T // 8, HEAD)])
                  + times(4, "collective-permute", 2, "step", [(B, T // 16, D)])),  # zig-zag and back
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_of_a_step(name):
    sizes, want = LAYOUTS[name]
    program, _ = compiled(sizes)
    got = sent(program.as_text())
    assert got == want, f"\nnot expected: {dict(got - want)}\nmissing: {dict(want - got)}"


def test_collectives_of_a_mixed_layout():
    """fsdp x context x tensor, two micro-batches: nothing larger than a layer in the loops, and no whole table."""
    program, state = compiled({"fsdp": 2, "context": 2, "tensor": 2}, micro_batches=2)
    got = sent(program.as_text())
    largest = max(int(np.prod(shape)) for (_, _, place, shape) in got if place == "layers")
    assert largest <= max(B // 4 * T * D, D * F // 2), "a layer's states or kernels at most"
    gathered = Counter({key: n for key, n in got.items() if key[0] == "all-gather" and key[2] == "layers"})
    halves = [(D, Q // 2)] * 3 + [(Q // 2, D), (D, F // 2), (D, F // 2), (F // 2, D)]
    assert gathered == times(2, "all-gather", 2, "layers", halves) + times(
        4, "all-gather", 2, "layers", [(B // 4, K // 2, T, HEAD)])
    assert all(shape != (D, V) for *_, shape in got), "no device has the whole head"
    assert got["all-gather", 2, "step", (D, V // 2)] == 1, "its part of the vocabulary, over fsdp, once"
    moments = jax.tree.leaves(map_with_path(lambda path, x: (path, x.sharding), state.opt_state))
    assert moments
    wanted = param_shardings(make_mesh(fsdp=2, context=2, tensor=2), state.params["student"])
    for moment in ("mu", "nu"):
        found = [s for p, s in _pairs(state.opt_state) if f"/{moment}/" in p]
        assert [s.spec for s in found] == [s.spec for s in jax.tree.leaves(wanted)]


def _pairs(tree):
    out = []
    map_with_path(lambda path, x: out.append((path, x.sharding)), tree)
    return out


PROGRAM = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[16,4]{1,0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %r = (f32[8]{0}, f32[4]{0}) reduce-scatter-start(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %z)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%init), condition=%cond, body=%body
  %all = f32[8]{0} all-reduce(%v), replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y':(1)2}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%v), replica_groups={{0},{1}}, to_apply=%add
  ROOT %p = f32[8]{0} collective-permute(%all), source_target_pairs={{0,1},{1,0}}
}
"""


TPU = """HloModule m

%all-reduce-scatter.1 (a: bf16[16,8]) -> bf16[4,8] {
  %r = bf16[16,8]{1,0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = bf16[4,8]{1,0} dynamic-slice(%r, %at, %zero), dynamic_slice_sizes={4,8}
}

%called.2 (b: f32[16,8]) -> f32[4,8] {
  ROOT %offloaded = f32[4,8]{1,0} reduce-scatter(%b), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}, execution_thread="sparsecore"

%fused.3 (c: bf16[4,8]) -> bf16[16,8] {
  ROOT %start = bf16[16,8]{1,0} all-gather(%c), channel_id=5, replica_groups={{0,1,2,3}}, x={chain_id="7"}
}

%async_collective_fusion.4 (c: bf16[4,8]) -> bf16[16,8] {
  ROOT %step = bf16[16,8]{1,0} all-gather(%c), channel_id=5, replica_groups={{0,1,2,3}}, x={chain_id="7"}
}

ENTRY %main (a: bf16[16,8]) -> bf16[4,8] {
  %splash = bf16[16,8]{1,0} custom-call(%a), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="attention"}
  %fusion = bf16[4,8]{1,0} fusion(%splash), kind=kCustom, calls=%all-reduce-scatter.1
  %c = ((f32[16,8], token[]), f32[4,8]) call-start(%x), async_execution_thread="sparsecore", to_apply=%called.2
  %s = bf16[16,8]{1,0} fusion(%fusion), kind=kCustom, calls=%fused.3
  %t = bf16[16,8]{1,0} fusion(%s), kind=kCustom, calls=%async_collective_fusion.4
  ROOT %g = bf16[16,8]{1,0} all-gather(%fusion), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_reading_the_text_of_tpus():
    """A kernel's metadata has lines that look like an end; a reduce-scatter is a fusion with an all-reduce in it, or
    runs on the SparseCores; a gather beside products is written once for its start and once for each step."""
    found = {c.name: (c.kind, c.bytes, c.group, c.sent) for c in collectives(TPU)}
    assert found == {"r": ("reduce-scatter", 256, 4, 0.75 * 256), "offloaded": ("reduce-scatter", 512, 4, 0.75 * 512),
                     "start": ("all-gather", 256, 4, 0.75 * 256), "g": ("all-gather", 256, 4, 0.75 * 256)}


def test_turns_of_a_loop_that_counts_by_two():
    counted = PROGRAM.replace("s32[] constant(5)", "u32[] constant(8)")
    text = counted.replace("  ROOT %t = (s32[], f32[8]) tuple(%i, %z)", """
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  ROOT %t = (u32[], f32[8]) tuple(%next, %z)""")
    assert {c.loops for c in collectives(text) if c.name in ("g", "r")} == {(4,)}


def test_reading_hlo_by_hand():
    found = {c.name: (c.kind, c.bytes, c.group, c.loops, c.sent) for c in collectives(PROGRAM)}
    assert found == {
        "g": ("all-gather", 128, 2, (5,), 0.5 * 128 * 5), "r": ("reduce-scatter", 32, 2, (5,), 0.5 * 32 * 5),
        "all": ("all-reduce", 32, 2, (), 32.0), "p": ("collective-permute", 32, 2, (), 32.0)}
