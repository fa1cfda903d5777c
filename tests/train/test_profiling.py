"""Reading a trace: what each instruction is put down to, hand-made traces of every platform, sums by hand."""

import pytest
from jax.profiler import ProfileData

from distill_jax.sharding.hlo import Instruction, instructions
from distill_jax.train.profiling import Event, part_of, phase_of, read_events, summarise

LAYER = "closed_call/layers/layers.block"
SCOPES = {
    f"jit(step)/jvp(student)/Transformer.hidden/{LAYER}/attention/q/dot_general": ("attention", "forward"),
    f"jit(step)/transpose(jvp(student))/Transformer.hidden/{LAYER}/mlp/gate/dot_general": ("mlp", "backward"),
    f"jit(step)/transpose(jvp(student))/Transformer.hidden/while/body/checkpoint/rematted_computation/{LAYER}/mlp/up/"
    "dot_general": ("mlp", "recompute"),
    f"jit(step)/jvp(student)/Transformer.hidden/{LAYER}/attention_norm/mul": ("norm", "forward"),
    f"jit(step)/jvp(student)/Transformer.hidden/{LAYER}/attention/q_norm/mul": ("attention", "forward"),
    f"jit(step)/jvp(student)/Transformer.hidden/{LAYER}/moe/router/dot_general": ("moe", "forward"),
    "jit(step)/jvp(student)/Transformer.hidden/embed/gather": ("embed", "forward"),
    f"jit(step)/teacher/Transformer.hidden/{LAYER}/mlp/gate/dot_general": ("teacher: mlp", "forward"),
    "jit(step)/teacher/Transformer.hidden/slice": ("teacher: other", "forward"),
    "jit(step)/jvp(loss)/while/body/dot_general": ("loss", "forward"),
    "jit(step)/optimizer/mul": ("optimizer", "forward"),
    "jit(step)/while/body/jvp(student)/Transformer.hidden/final_norm/mul": ("norm", "forward"),
    "jit(step)/broadcast_in_dim": ("other", "forward"),
    "": ("other", "forward"),
}


@pytest.mark.parametrize(("scope", "expected"), SCOPES.items(), ids=range(len(SCOPES)))
def test_scopes(scope, expected):
    instruction = Instruction("fusion", scope)
    assert (part_of(instruction), phase_of(instruction)) == expected


def test_collectives_are_a_part_of_their_own():
    assert part_of(Instruction("all-gather-start", "jit(step)/jvp(student)/embed/gather")) == "collectives"
    assert part_of(Instruction("reduce-scatter", "")) == "collectives"
    assert part_of(Instruction("reduce", "jit(step)/optimizer/reduce_sum")) == "optimizer"


def test_the_student_has_the_name_of_its_provider():
    scope = "jit(step)/jvp(small)/Transformer.hidden/embed/gather"
    assert part_of(Instruction("fusion", scope), student="small") == "embed"
    assert part_of(Instruction("fusion", scope), student="student") == "small: embed"


HLO = """HloModule jit_step
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(step)/optimizer/mul"}
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %dot.1 = f32[4]{0} dot(%a, %a), metadata={op_name="jit(step)/jvp(student)/Transformer.hidden/mlp/up/dot_general"}
  %while.2 = f32[4]{0} while(%dot.1), body=%fused
  ROOT %fusion.3 = f32[4]{0} fusion(%while.2), kind=kLoop, calls=%fused
}
"""


def test_instructions_of_a_text():
    found = instructions(HLO)
    assert found["dot.1"] == ("dot", "jit(step)/jvp(student)/Transformer.hidden/mlp/up/dot_general")
    assert found["fusion.3"] == ("fusion", "jit(step)/optimizer/mul")  # of what it is made of
    assert found["while.2"].opcode == "while" and found["m"].opcode == "multiply"


def test_sums_by_hand():
    """Two devices; on the first, two threads overlap for a second, inside a loop that is not counted itself."""
    event = lambda name, device, begin, end: Event(name=name, device=device, begin=begin, end=end)
    profile = summarise([event("while.2", 0, 0, 5), event("dot.1", 0, 0, 2), event("dot.1", 0, 1, 4),
                         event("fusion.3", 1, 0, 3), event("unknown", 1, 7, 8)], instructions(HLO))
    assert profile.devices == 2
    assert profile.seconds == pytest.approx((2 + 3 + 3 + 1) / 2)
    assert profile.busy == pytest.approx((5 + 4) / 2)
    assert [(r.name, r.part, r.seconds) for r in profile.rows] == [
        ("dot.1", "mlp", 2.5), ("fusion.3", "optimizer", 1.5), ("unknown", "other", 0.5)]
    assert profile.parts()["mlp"] == {"forward": 2.5, "backward": 0.0, "recompute": 0.0}


def trace(folder, planes):
    """Write a trace. planes: {plane: {line: [(event, begin ps, duration ps, {stat: text})]}}."""
    text = ""
    for plane, lines in planes.items():
        events = sorted({e[0] for line in lines.values() for e in line})
        stats = sorted({s for line in lines.values() for e in line for s in e[3]})
        body = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{e}" }} }}\n' for i, e in enumerate(events))
        body += "".join(f'stat_metadata {{ key: {i} value {{ id: {i} name: "{s}" }} }}\n' for i, s in enumerate(stats))
        for name, line in lines.items():
            inner = "".join(f"events {{ metadata_id: {events.index(e)} offset_ps: {begin} duration_ps: {length} "
                            f"{_stats(of, stats)} }}\n" for e, begin, length, of in line)
            body += f'lines {{ name: "{name}" {inner} }}\n'
        text += f'planes {{ name: "{plane}" {body} }}\n'
    folder.mkdir(exist_ok=True)
    (folder / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text))


def _stats(of, names):
    return " ".join(f'stats {{ metadata_id: {names.index(s)} str_value: "{v}" }}' for s, v in of.items())


US = 10**6
OURS, OTHER = {"hlo_module": "jit_step"}, {"hlo_module": "jit_other"}
TRACES = {
    "cpu": {"/host:CPU": {"tf_XLAEigen/1": [("dot.1", 0, 2 * US, OURS | {"hlo_op": "dot.1"}),
                                            ("end: dot.1", 2 * US, 1, {}),
                                            ("dot.9", 0, US, OTHER | {"hlo_op": "dot.9"})]}},
    "gpu": {"/device:GPU:0": {"Stream #13(Compute)": [("nvjet_tst", 0, 2 * US, OURS | {"hlo_op": "dot.1"}),
                                                      ("memcpy", 0, US, {})]},
            "/host:CPU": {"python": [("PjitFunction(step)", 0, US, {})]}},
    "tpu": {"/device:TPU:0": {"Steps": [("0", 0, 9 * US, {})], "XLA Modules": [("jit_step(1)", 0, 9 * US, {})],
                              "XLA Ops": [("%dot.1 = f32[4]{0} dot(%a, %a)", 0, 2 * US, {})]}},
}


@pytest.mark.parametrize("platform", TRACES)
def test_traces_of_platforms(tmp_path, platform):
    trace(tmp_path / "t", TRACES[platform])
    (event,) = read_events(tmp_path / "t", "jit_step")
    assert (event.name, event.device) == ("dot.1", 0)
    assert event.end - event.begin == pytest.approx(2e-6, rel=1e-2)


def test_an_empty_trace_is_said(tmp_path):
    with pytest.raises(ValueError, match="no instruction of jit_step"):
        read_events(tmp_path, "jit_step")
    trace(tmp_path / "t", {"/host:CPU": {"python": [("x", 0, US, {})]}})
    with pytest.raises(ValueError, match="no instruction of jit_step"):
        read_events(tmp_path / "t", "jit_step")
