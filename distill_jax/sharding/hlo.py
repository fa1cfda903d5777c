"""What a compiled program sends between devices, read from its HLO text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
           "u64": 8, "f64": 8, "c64": 8}
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY\s+)?%?([\w.\-]+)\s*(?:\([^=]*)?\{\s*$|^(?:ENTRY\s+)?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z\-]+)\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_MESH = re.compile(r"replica_groups=@?\w*mesh\[(.*?)\]\s*\{(.*?)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """kind: of KINDS; bytes: of the whole (gathered or unreduced) array on one device, each time; group: devices that
    take part together; trips: times a step (a loop whose count is not known counts once); name: in the HLO."""

    kind: str
    bytes: int
    group: int
    trips: int
    name: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by ring algorithms."""
        share = (self.group - 1) / self.group if self.group else 0.0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.trips


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective of a compiled module, in the order of the text."""
    bodies = dict(_computations(hlo_text))
    trips = _trips(bodies)
    found: list[Collective] = []
    for name, lines in bodies.items():
        for line in lines:
            if (one := _collective(line, trips.get(name, 1))) is not None:
                found.append(one)
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in text.splitlines():
        if line.rstrip().endswith("{") and not line.startswith(" ") and (m := _COMPUTATION.match(line)):
            name, lines = m.group(1) or m.group(2), []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _trips(bodies: dict[str, list[str]]) -> dict[str, int]:
    """{computation: times it runs in a step}. Callees stand before their callers in the text."""
    out = dict.fromkeys(bodies, 0)
    names = list(bodies)
    if names:
        out[names[-1]] = 1
    for name in reversed(names):  # the entry comes last; async wrappers are callees too
        for line in bodies[name]:
            many = _count(line, bodies) if " while(" in line else 1
            called = set(_CALLED.findall(line))
            if m := _BRANCHES.search(line):
                called |= {x.strip().lstrip("%") for x in m.group(1).split(",")}
            for callee in called & set(out):
                out[callee] += (out[name] or 1) * many
    return {name: max(1, n) for name, n in out.items()}


def _count(line: str, bodies: dict[str, list[str]]) -> int:
    """Trips of a while loop: as noted by XLA, or the one constant that its condition compares with; 1 if unknown."""
    if m := _TRIPS.search(line):
        return int(m.group(1))
    m = re.search(r"condition=%?([\w.\-]+)", line)
    body = "\n".join(bodies.get(m.group(1), [])) if m else ""
    for callee in _CALLED.findall(body):
        body += "\n" + "\n".join(bodies.get(callee, []))
    limits = set(re.findall(r"s32\[\]\S* constant\((\d+)\)", body))
    return max(1, int(limits.pop())) if len(limits) == 1 else 1


def _collective(line: str, trips: int) -> Collective | None:
    m = _OP.match(line)
    if m is None:
        return None
    name, result, kind = m.groups()
    started = kind.endswith("-start")
    kind = kind.removesuffix("-start")
    if kind not in KINDS:
        return None
    sizes = [math.prod(int(x) for x in dims.split(",") if x) * _WIDTHS.get(t, 1) for t, dims in _ARRAY.findall(result)]
    group = _group(line)
    return Collective(kind=kind, bytes=_whole(kind, sizes, group, started), group=group, trips=trips, name=name)


def _whole(kind: str, sizes: list[int], group: int, started: bool) -> int:
    """Bytes of the larger side. The result of a `-start` is its operands and then its results; of an all-reduce's, only
    the results."""
    half = len(sizes) // 2
    if kind == "all-reduce":
        return sum(sizes)
    if kind == "collective-permute" and started:
        return sizes[0]
    if not started:
        return sum(sizes) * (group if kind == "reduce-scatter" else 1)
    return max(sum(sizes[:half]), sum(sizes[half:]))


def _group(line: str) -> int:
    if m := _IOTA.search(line):
        return int(m.group(2))
    if m := _LISTED.search(line):
        return len([x for x in m.group(1).split(",") if x])
    if m := _MESH.search(line):  # mesh['a'=8,'b'=2] {'a'}; a part of an axis is 'a':(1)2
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", m.group(1))}
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", m.group(2))
        return math.prod(int(part) if part else sizes[axis] for axis, part in named)
    return 2 if _PAIRS.search(line) else 1
