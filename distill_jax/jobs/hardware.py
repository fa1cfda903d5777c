"""Devices by name: peak bf16 FLOP/s and memory. Published figures of dense matmuls, per device."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """flops: peak bf16 FLOP/s; memory: bytes; mfu: share of the peak a tuned dense training step reaches."""

    flops: float
    memory: float
    mfu: float = 0.4


GIB = 2.0**30

DEVICES: dict[str, Device] = {
    "h200": Device(flops=989e12, memory=141e9, mfu=0.45),
    "h100": Device(flops=989e12, memory=80e9, mfu=0.45),
    "a100-80g": Device(flops=312e12, memory=80e9, mfu=0.45),
    "a100-40g": Device(flops=312e12, memory=40e9, mfu=0.45),
    "l40s": Device(flops=362e12, memory=48e9),
    "rtx4090": Device(flops=165e12, memory=24e9),
    "v4": Device(flops=275e12, memory=32 * GIB, mfu=0.5),
    "v5e": Device(flops=197e12, memory=16 * GIB, mfu=0.5),
    "v5p": Device(flops=459e12, memory=95 * GIB, mfu=0.5),
    "v6e": Device(flops=918e12, memory=32 * GIB),
    "cpu": Device(flops=0.1e12, memory=16 * GIB, mfu=0.4),
}


def parse(text: str) -> tuple[str, Device, int]:
    """`h200:8` -> ("h200", Device, 8). Raises ValueError naming the known devices."""
    name, _, count = text.partition(":")
    if name not in DEVICES or (count and not (count.isdigit() and int(count))):
        raise ValueError(f"--on {text!r}: expected NAME or NAME:COUNT with NAME one of {', '.join(DEVICES)}")
    return name, DEVICES[name], int(count or 1)
