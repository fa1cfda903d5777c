"""Devices by name: peak FLOP/s, memory and links. Published figures of dense matmuls, per device."""

import math
from dataclasses import dataclass

GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator.

    flops      peak bf16 FLOP/s
    memory     bytes
    mfu        share of the peak a tuned dense training step reaches without waiting for other devices (assumed)
    link       bytes/s a device sends to its neighbours at once: NVLink; all ICI links, one direction each
    network    bytes/s of a device to other hosts (InfiniBand, Ethernet); for TPUs: to other slices
    host       devices of a host that `link` joins; None: `link` joins the whole slice
    platform   what compiles for it
    axes       dimensions of a slice's torus
    int8, fp8  peak op/s of products of 8 bits (fp8 summed in float32); 0: no faster than bf16
    """

    flops: float
    memory: float
    mfu: float = 0.4
    link: float = 32e9
    network: float = 3e9
    host: int | None = 8
    platform: str = "cuda"
    axes: int = 0
    int8: float = 0.0
    fp8: float = 0.0


def _tpu(flops: float, gib: float, axes: int, link: float, mfu: float, int8: float = 0.0) -> Device:
    return Device(flops=flops, memory=gib * GIB, mfu=mfu, link=2 * axes * link, network=6e9, host=None, platform="tpu",
                  axes=axes, int8=int8)


DEVICES: dict[str, Device] = {
    "h200": Device(flops=989e12, memory=141e9, mfu=0.45, link=450e9, network=50e9, int8=1979e12, fp8=1979e12),
    "h100": Device(flops=989e12, memory=80e9, mfu=0.45, link=450e9, network=50e9, int8=1979e12, fp8=1979e12),
    "a100-80g": Device(flops=312e12, memory=80e9, mfu=0.45, link=300e9, network=25e9, int8=624e12),
    "a100-40g": Device(flops=312e12, memory=40e9, mfu=0.45, link=300e9, network=12.5e9, int8=624e12),
    "l40s": Device(flops=362e12, memory=48e9, int8=733e12, fp8=733e12),
    "rtx4090": Device(flops=165e12, memory=24e9, int8=661e12, fp8=330e12),
    "v4": _tpu(275e12, 32, 3, 45e9, 0.5),
    "v5e": _tpu(197e12, 16, 2, 45e9, 0.5, 394e12),
    "v5p": _tpu(459e12, 95, 3, 90e9, 0.5, 918e12),
    "v6e": _tpu(918e12, 32, 2, 90e9, 0.4, 1836e12),
    "cpu": Device(flops=0.1e12, memory=16 * GIB, mfu=0.4, link=10e9, platform="cpu"),
}
"""Memory of data centre GPUs in GB as sold; ICI links one way: v5p and v6e 90 GB/s, v4 and v5e 45 GB/s each."""


def within_slice(device: Device, devices: int, group: int) -> float:
    """bytes/s that a device of a TPU slice sends to a group: by the links along as many axes of the torus (taken as of
    equal sides) as hold it."""
    side = max(2.0, devices ** (1 / device.axes))
    used = min(device.axes, max(1, round(math.log(group) / math.log(side))))
    return device.link * used / device.axes


@dataclass(frozen=True, kw_only=True)
class Target:
    """Devices of one kind: `h200:8`, `v5p:16`, or a TPU slice `v5p:4x4x4`. slice: "" where there is none."""

    text: str
    name: str
    device: Device
    count: int
    slice: str = ""

    @property
    def platform(self) -> str:
        return self.device.platform


def parse(text: str) -> Target:
    """`h200:8` or `v5p:4x4x4` -> Target. Raises ValueError naming the known devices or slices."""
    name, _, rest = text.partition(":")
    sides = [int(s) for s in rest.split("x") if s.isdigit()] if rest else [1]
    device = DEVICES.get(name)
    if device is None or not sides or math.prod(sides) < 1 or len(sides) != rest.count("x") + 1:
        raise ValueError(f"--on {text!r}: expected NAME, NAME:COUNT or a TPU slice like v5p:4x4x4, with NAME one of "
                         f"{', '.join(DEVICES)}")
    count = math.prod(sides)
    if len(sides) == 1:
        return Target(text=text, name=name, device=device, count=count, slice=_slice(text, device, count))
    if len(sides) != device.axes:
        raise ValueError(f"--on {text!r}: a slice of {name} has {device.axes or 'no'} sides, got {len(sides)}; "
                         f"e.g. {name}:{_slice(text, device, 16) or 8}")
    return Target(text=text, name=name, device=device, count=count, slice=rest)


def _slice(text: str, device: Device, count: int) -> str:
    """Sides as equal as powers of two allow; the smallest slice (one host) for fewer devices than that has."""
    if not device.axes:
        return ""
    if count & (count - 1):
        raise ValueError(f"--on {text!r}: TPU slices have a power of two of chips; write another form as its sides, "
                         f"e.g. {'4x4x12' if device.axes == 3 else '8x8'}")
    sides = [2, 2, 1][:device.axes]
    while math.prod(sides) < count:
        sides[sides.index(min(sides))] *= 2
    return "x".join(str(s) for s in sorted(sides)) if math.prod(sides) > 4 else "x".join(map(str, sides))
