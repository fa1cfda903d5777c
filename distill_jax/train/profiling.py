"""Where the time of a step goes: a profiler's trace, read back and added up by the scopes of the program.

The trace names instructions of the compiled program; its HLO text says which scope each was traced in: a module of the
model (`embed`, `attention`, `mlp` or `moe`, a norm), `loss` and `optimizer` of the step (`train.step`), collectives
whatever they are for. Each instruction counts once: a fusion belongs to the scope of its result, loops and branches
are what runs in them.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill_jax.sharding.hlo import KINDS, Instruction

Phase = Literal["forward", "backward", "recompute"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute")
PARTS = {"embed": "embed", "attention": "attention", "mlp": "mlp", "moe": "moe", "loss": "loss",
         "optimizer": "optimizer"}
CONTROL = ("while", "conditional", "call")
"""Opcodes whose time is that of the instructions in them."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One run of an instruction: its name in the HLO text, the device, and begin and end in seconds."""

    name: str
    device: int
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One instruction over the whole trace: seconds of one device (the mean over devices), and how often it ran."""

    name: str
    part: str
    phase: Phase
    seconds: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """rows: every instruction, most time first; busy: seconds in which a device had something to do (mean)."""

    rows: tuple[Row, ...]
    busy: float
    devices: int

    @property
    def seconds(self) -> float:
        """Of all instructions. More than `busy` where a device runs several at a time (the threads of a CPU)."""
        return sum(r.seconds for r in self.rows)

    def parts(self) -> dict[str, dict[Phase, float]]:
        """{part: {phase: seconds}}, most time first."""
        out: dict[str, dict[Phase, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
        for r in self.rows:
            out[r.part][r.phase] += r.seconds
        return dict(sorted(out.items(), key=lambda item: -sum(item[1].values())))


def part_of(instruction: Instruction, student: str = "student") -> str:
    """The part of a step that an instruction belongs to; of models that are not the student it is their provider's name
    in front: "teacher: mlp"."""
    kind = re.sub(r"-(start|done)$", "", instruction.opcode)
    if kind in KINDS:
        return "collectives"
    names = re.split(r"[/()]+", instruction.scope)
    found = next((p for n in names if (p := PARTS.get(n) or ("norm" if n.endswith("_norm") else ""))), "other")
    models = [i for i, n in enumerate(names) if n.startswith("Transformer.")]
    owner = next((n for n in reversed(names[:models[0]]) if n and n not in ("jvp", "transpose")), "") if models else ""
    return f"{owner}: {found}" if owner not in ("", student, "step") and found not in ("loss", "optimizer") else found


def phase_of(instruction: Instruction) -> Phase:
    """By what `jax.grad` and `jax.checkpoint` write into scopes. The lifted loss makes its gradient in the forward."""
    if "rematted_computation" in instruction.scope:
        return "recompute"
    return "backward" if "transpose(" in instruction.scope else "forward"


def read_events(folder: Path, module: str) -> list[Event]:
    """Events of the program `module` ("jit_step") in the newest trace under `folder`, on CPU, GPU and TPU.

    Raises ValueError where the trace has none.
    """
    from jax.profiler import ProfileData

    files = sorted(folder.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    with warnings.catch_warnings():  # of jax's binding, on Python 3.12: where it is an error, it ends the process
        warnings.simplefilter("ignore", DeprecationWarning)
        events = list(_events(ProfileData.from_file(str(files[-1])), module)) if files else []
    if not events:
        raise ValueError(f"the trace in {folder} has no instruction of {module}: the profiler recorded nothing of this "
                         "device; run one profile at a time, and see the profiler's messages above")
    return events


def _events(data: Any, module: str) -> Iterable[Event]:
    for plane in data.planes:
        device = re.match(r"/device:(GPU|TPU):(\d+)", plane.name)
        if device is None and plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            if device is not None and device[1] == "TPU" and line.name != "XLA Ops":
                continue  # steps, modules and asynchronous copies are other views of the same time
            for e in line.events:
                stats = dict(e.stats)
                name = stats.get("hlo_op") or (device and device[1] == "TPU" and e.name)
                if not name or stats.get("hlo_module", module) != module:
                    continue
                number = int(device[2]) if device else int(stats.get("device_ordinal", 0))
                yield Event(name=str(name).lstrip("%").split(" ")[0], device=number, begin=e.start_ns * 1e-9,
                            end=(e.start_ns + e.duration_ns) * 1e-9)


def summarise(events: Iterable[Event], program: Mapping[str, Instruction], student: str = "student") -> Profile:
    """Add up a trace. program: `hlo.instructions` of what ran; an instruction it does not know is "other"."""
    seconds: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    spans: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for e in events:
        spans[e.device].append((e.begin, e.end))
        if program.get(e.name, Instruction("", "")).opcode not in CONTROL:
            seconds[e.name] += e.end - e.begin
            count[e.name] += 1
    devices = max(1, len(spans))
    rows = [Row(name=n, part=part_of(i, student), phase=phase_of(i), seconds=s / devices, count=count[n] // devices)
            for n, s in seconds.items() for i in [program.get(n, Instruction("", ""))]]
    return Profile(rows=tuple(sorted(rows, key=lambda r: -r.seconds)), devices=devices,
                   busy=sum(map(_covered, spans.values())) / devices)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
