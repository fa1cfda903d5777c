"""Model FLOPs of a batch and the peak of a device: what the MFU divides. Recomputation is never counted."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.batch import Stream
from distill_jax.models.config import ModelConfig

Array = Any

PEAKS: dict[str, float] = {
    "H100": 989e12, "H200": 989e12, "GH200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12,
    "GB200": 2250e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12,
}
"""Dense bf16 FLOP/s per chip by a part of `device_kind`, from the makers' data sheets (without sparsity)."""


def peak_flops(device: Any) -> float | None:
    """Dense bf16 peak of a device; None where it is not known (CPUs, new accelerators): then no MFU is reported."""
    kind = device.device_kind
    known = [name for name in PEAKS if name in kind]
    return PEAKS[max(known, key=len)] if known else None


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Counts the FLOPs one provider spends on a stream. Multiply-adds count 2; attention counts visible pairs only.

    matrices   entries of the layers' matrices: each token passes through all of them (of a mixture, those
               of its `top_k` experts and the router)
    head       entries of the output head: only tokens with a loss pass through it
    full       attention width (heads x head_dim, summed over layers) of full attention
    sliding    the same for sliding layers, which see `window` tokens
    passes     3 for a trained model (forward, and twice that backward), 1 for a frozen one
    """

    matrices: int
    head: int
    full: int
    sliding: int = 0
    window: int | None = None
    passes: int = 3

    @classmethod
    def of(cls, config: ModelConfig, *, trained: bool = True) -> "Flops":
        heads = config.num_heads * config.head_dim
        slides = sum(config.sliding)
        return cls(matrices=config.layer_weights * config.num_layers,
                   head=config.hidden_size * config.vocab_size, full=heads * (config.num_layers - slides),
                   sliding=heads * slides, window=config.attention.window, passes=3 if trained else 1)

    def count(self, stream: Stream, predicted: Array) -> Array:
        """float32 [] FLOPs of a global batch. predicted [B,T]: True where some loss reads the token's logits."""
        real = stream.segment_ids != 0
        total = lambda x: jnp.sum(jnp.where(real, x, 0).astype(jnp.float32))
        seen = stream.positions + 1
        macs = float(self.matrices) * total(jnp.ones_like(seen))  # an int beyond 2^31 (7B) is no operand of jax
        macs += float(self.head) * jnp.sum(predicted.astype(jnp.float32))
        macs += 2.0 * self.full * total(seen)
        if self.sliding and self.window:
            macs += 2.0 * self.sliding * total(jnp.minimum(seen, self.window))
        return 2.0 * self.passes * macs


def memory_bytes() -> int | None:
    """Peak bytes in use on this process's first device; None where the backend does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")
