"""How long a step takes, modelled: FLOPs at an assumed share of the peak, and what a layout sends over the links.

Assumed: ring algorithms at the published bandwidth of the links, which `Device` says; gathers and reductions of
parameters run beside the computation, what tensor and context parallelism send does not. Bytes are of one device.
"""

import math
from collections.abc import Mapping, Sequence

from distill_jax.jobs.hardware import Device, within_slice
from distill_jax.jobs.memory import Cut
from distill_jax.models.config import ModelConfig
from distill_jax.models.quantized import MATMULS, Format
from distill_jax.models.remat import policy_of
from distill_jax.recipe import Stage, Student

INNER = ("tensor", "context", "expert", "fsdp", "data")
"""Mesh axes, innermost first: how many devices lie between neighbours decides which link an axis uses."""


def step_seconds(stage: Stage, configs: Mapping[str, ModelConfig], runs: Mapping[str, Sequence[int]],
                 sizes: Mapping[str, int], device: Device, flops: float) -> tuple[float, float]:
    """(seconds of computation, seconds of waiting) of one update. flops: of all devices, recomputation included."""
    compute = flops / (device.flops * device.mfu * Cut.of(stage, sizes, device.platform).devices)
    beside, between = 0.0, 0.0
    for name, provider in stage.models.items():
        sent = step_bytes(configs[name], trainable=provider.trainable, sizes=sizes, runs=runs[name], stage=stage,
                          again=policy_of(provider.remat).again > 0.5,
                          item=2 if provider.precision == "bfloat16" else 4, how=MATMULS[provider.matmul])
        seconds = {axis: n / bandwidth(device, sizes, axis) for axis, n in sent.items()}
        beside += seconds["fsdp"] + seconds["data"] + seconds["expert"]
        between += seconds["tensor"] + seconds["context"]
    return compute, max(0.0, beside - compute) + between


def in_eight_bits(provider: Student, c: ModelConfig, tokens: float) -> float:
    """FLOPs of a provider's products with operands of 8 bits, over all its passes."""
    how = MATMULS[provider.matmul]
    passes = 1 + provider.trainable * ((policy_of(provider.remat).again > 0.5) + bool(how and how.grad))
    return 2.0 * c.layer_weights * c.num_layers * tokens * passes if how else 0.0


def speed_of(provider: Student, device: Device) -> float:
    """How many times faster than bf16 those products are at the peak; 1 on a device without units for them."""
    how = MATMULS[provider.matmul]
    return max(1.0, getattr(device, how.unit) / device.flops) if how else 1.0


def step_bytes(c: ModelConfig, *, trainable: bool, sizes: Mapping[str, int], runs: Sequence[int], stage: Stage,
               item: int, again: bool, how: Format | None = None) -> dict[str, float]:
    """{axis: bytes a device sends in one update}.

    fsdp: layers gathered for each pass in the compute dtype, their gradients scattered in it; the head in both, its
    gradient in float32. data: gradients reduced in float32. tensor: hidden states reduced after attention and MLP in
    each pass. context: keys and values gathered in each pass. Where a pass multiplies in 8 bits, kernels travel as
    such, and the sums over `tensor` in 4 bytes.
    """
    cut = Cut.of(stage, sizes, "")
    ring = {axis: (n - 1) / n for axis, n in sizes.items()}
    head = c.vocab_size * c.hidden_size
    layers = (c.num_params - head * (1 if c.tied else 2)) / sizes["tensor"]
    passes = 1 if not trainable else 3 if again else 2
    eight = 0 if how is None else passes if how.grad is not None or not trainable else passes - 1
    tokens = sum(map(cut.tokens, runs))
    gathers = layers * (item * (passes - eight) + eight) * (sizes["fsdp"] > 1) + head * item
    sums = item * (passes - eight) + 4 * eight
    grads = (layers * item + head * 4) * trainable
    kv = 2 * c.num_kv_heads * c.head_dim * c.num_layers * item * tokens * sizes["context"]
    return {
        "fsdp": ring["fsdp"] * stage.micro_batches * (gathers + grads), "expert": 0.0,
        "data": 2 * ring["data"] * 4 * c.num_params / (sizes["fsdp"] * sizes["tensor"]) * trainable,
        "tensor": 2 * ring["tensor"] * 2 * sums * c.num_layers * c.hidden_size * tokens * stage.micro_batches,
        "context": ring["context"] * kv * passes * stage.micro_batches,
    }


def bandwidth(device: Device, sizes: Mapping[str, int], axis: str) -> float:
    """bytes/s a device sends along a mesh axis: the link while the axis stays within a host, else the network; in a
    TPU slice the links along what it spans of the torus."""
    if device.axes:
        return within_slice(device, math.prod(sizes.values()), sizes[axis])
    inside = 1
    for name in INNER:
        inside *= sizes[name]
        if name == axis:
            break
    return device.link if device.host is None or inside <= device.host else device.network
