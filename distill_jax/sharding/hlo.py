"""A compiled program's HLO text: what it sends between devices, and where in the source its instructions come from."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
         "ragged-all-to-all")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}

_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_HEAD = re.compile(r"^\s*(?:ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->.*\{\s*$")
_END = re.compile(r'^\}(, execution_thread="\w+")?\s*(//.*)?$')  # a kernel's metadata has lines that begin so too
_OP = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+) = (.+?) ([a-z\-]+)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CONSTANT = re.compile(r"^\s*%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_ADD = re.compile(r"^\s*%?([\w.\-]+) = [su]32\[\]\S* add\(%?[\w.\-]+, %?([\w.\-]+)\)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_NAMED = re.compile(r"replica_groups=\w+\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a program.

    kind    of `KINDS`
    shapes  the arrays that come out, as in the text
    bytes   of the whole array on one device: before it is scattered, after it is gathered
    group   devices that take part
    loops   turns of the loops it stands in, outermost first; None where the text does not say
    op      where in the program it comes from (`metadata`)
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: float
    group: int
    loops: tuple[int | None, ...]
    op: str
    name: str

    @property
    def trips(self) -> int:
        """How often it runs; loops of unknown length count once."""
        return math.prod(n or 1 for n in self.loops)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run of the program, by ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.trips


class Instruction(NamedTuple):
    """opcode: "fusion", "dot", "all-reduce-start", ...; scope: the `op_name` of its metadata, or ""."""

    opcode: str
    scope: str


def instructions(text: str) -> dict[str, Instruction]:
    """{name: Instruction} of `compiled.as_text()`. A fusion without a scope has that of the first of its parts."""
    computations = dict(_computations(text))
    out: dict[str, Instruction] = {}
    for lines in computations.values():
        for line in lines:
            if not (op := _OP.match(line)):
                continue
            scope = _SCOPE.search(line)
            if scope is None and op[3] == "fusion":
                parts = (p for c in _CALLED.findall(line) for p in computations.get(c, []))
                scope = next(filter(None, map(_SCOPE.search, parts)), None)
            out[op[1]] = Instruction(op[3], scope[1] if scope else "")
    return out


def collectives(text: str) -> list[Collective]:
    """All collectives of `compiled.as_text()` that run between several devices, with the loops they stand in."""
    computations = dict(_computations(text))
    loops = _loops(computations)
    out, chains = [], set()
    for name, lines in computations.items():
        for line in lines:
            if not (op := _OP.match(line)):
                continue
            kind = op[3].removesuffix("-start")
            if kind in KINDS and (group := _group(kind, line)) > 1:
                if chain := _CHAIN.search(line):  # TPU: its start, its steps beside products, its end: sent once
                    if (key := (chain[1], op[2], *re.findall(r"channel_id=\d+", line))) in chains:
                        continue
                    chains.add(key)
                read = _scattered if name.startswith("all-reduce-scatter") else _read
                for around in loops.get(name, []):
                    out.append(read(op, kind, group, around, line))
    return out


def _scattered(op: re.Match[str], kind: str, group: int, around: tuple[int | None, ...], line: str) -> Collective:
    """TPU: a fusion `all-reduce-scatter` is an all-reduce and a cut to the eye, and runs as a reduce-scatter."""
    whole = _read(op, kind, group, around, line)
    return dataclasses.replace(whole, kind="reduce-scatter") if kind == "all-reduce" else whole


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, lines = ("ENTRY" if line.startswith("ENTRY") else head[1]), []
        elif name and _END.match(line):
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _loops(computations: dict[str, list[str]]) -> dict[str, list[tuple[int | None, ...]]]:
    """{computation: the loops around each of its calls}; a reduction called by all-reduces appears as often."""
    out: dict[str, list[tuple[int | None, ...]]] = {}
    todo: list[tuple[str, tuple[int | None, ...]]] = [("ENTRY", ())]
    while todo:
        name, around = todo.pop()
        out.setdefault(name, []).append(around)
        for line in computations[name]:
            op = _OP.match(line)
            if not op or op[3].removesuffix("-start") in (*KINDS, "reduce", "scatter", "sort", "map", "reduce-window"):
                continue
            inner = around
            if op[3] == "while":
                inner = (*around, _turns(line, computations))
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [b.strip().lstrip("%") for b in branches.split(",")]
            todo += [(c, inner) for c in called if c in computations]
    return out


def _turns(line: str, computations: dict[str, list[str]]) -> int | None:
    """Turns of a while loop: as XLA notes them, or the one constant that its condition compares with (TPU)."""
    if trips := _TRIPS.search(line):
        return int(trips[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(computations.get(condition[1], [])) if condition else ""
    for callee in _CALLED.findall(text):
        text += "\n" + "\n".join(computations.get(callee, []))
    limits = set(re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text))
    body = re.search(r"body=%?([\w.\-]+)", line)
    return -(-int(limits.pop()) // _step(computations.get(body[1], []) if body else [])) if len(limits) == 1 else None


def _step(body: list[str]) -> int:
    """What is added to a loop's counter in a turn (TPU: products in parts take two at a time); 1 where it is not seen.
    """
    constants = {m[1]: int(m[2]) for line in body if (m := _CONSTANT.match(line))}
    out = next((set(re.findall(r"%([\w.\-]+)", line.split(" tuple(")[-1])) for line in body
                if line.lstrip().startswith("ROOT") and " tuple(" in line), set())
    steps = {constants[m[2]] for line in body if (m := _ADD.match(line)) and m[1] in out and m[2] in constants}
    return steps.pop() if len(steps) == 1 and 0 not in steps else 1


def _group(kind: str, line: str) -> int:
    if kind == "collective-permute":
        return 2 if re.search(r"source_target_pairs=\{\{", line) else 1
    if listed := _LISTED.search(line):
        return listed[1].count(",") + 1
    if named := _NAMED.search(line):  # mesh['a'=4,'b'=2] {'a'}: groups along these axes
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # a part of an axis is 'a':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    iota = _IOTA.search(line)
    return int(iota[2]) if iota else 1


def _read(op: re.Match[str], kind: str, group: int, around: tuple[int | None, ...], line: str) -> Collective:
    arrays = [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _ARRAY.findall(op[2]) if d in BYTES]
    if op[3] == "collective-permute-start":  # (operand, result, ...)
        arrays = arrays[1:2]
    elif op[3].endswith("-start") and kind != "all-reduce":  # (operands, results)
        arrays = arrays[len(arrays) // 2:]
    size = sum(BYTES[d] * math.prod(shape) for d, shape in arrays)
    where = _SCOPE.search(line)
    whole = size * group if kind == "reduce-scatter" else size
    return Collective(kind=kind, shapes=tuple(s for _, s in arrays), bytes=whole, group=group, loops=around,
                      op=where[1] if where else "", name=op[1])
