"""Optimisers as frozen specs: a recipe writes one down, `build` turns it into an optax transformation."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import tree

Array = Any
VECTORS = ("bias", "scale")
"""Last path component of parameters that are vectors in every layer (with scanned layers they have two axes)."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with warm-up, decay and clipping by global norm (Loshchilov & Hutter 2019, decoupled weight decay).

    peak_lr       learning rate at the end of the warm-up
    warmup        updates of linear warm-up; a value below 1 is a share of all updates
    decay         shape after the warm-up; "cosine" and "linear" end at `end_factor * peak_lr`
    weight_decay  applied to matrices only: never to biases, norm scales or other vectors
    grad_clip     largest global gradient norm; None: no clipping
    """

    peak_lr: float = 3e-4
    warmup: float = 0.03
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    end_factor: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"AdamW.decay must be cosine, linear or constant, got {self.decay!r}")
        if self.peak_lr < 0 or self.warmup < 0 or not 0 <= self.end_factor <= 1:
            raise ValueError(f"AdamW needs peak_lr >= 0, warmup >= 0 and end_factor in [0, 1], got {self}")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"AdamW.grad_clip must be positive, or None for no clipping, got {self.grad_clip}")

    def schedule(self, total_steps: int) -> "Schedule":
        """The learning rate by update."""
        warmup = round(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)
        return Schedule(peak=self.peak_lr, warmup=min(warmup, total_steps), total=total_steps, decay=self.decay,
                        end=self.end_factor * self.peak_lr)

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """The optax transformation; its `init` and `update` are safe under strict dtype promotion."""
        with jax.numpy_dtype_promotion("standard"):
            parts = [] if self.grad_clip is None else [optax.clip_by_global_norm(self.grad_clip)]
            parts.append(optax.adamw(self.schedule(total_steps), b1=self.b1, b2=self.b2, eps=self.eps,
                                     weight_decay=self.weight_decay, mask=decay_mask))
            return _standard_promotion(optax.chain(*parts))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear from peak/warmup to `peak` over `warmup` updates, then to `end` at update `total`."""

    peak: float
    warmup: int
    total: int
    decay: Literal["cosine", "linear", "constant"]
    end: float

    def __call__(self, step: Array) -> Array:
        s = jnp.asarray(step).astype(jnp.float32)
        up = self.peak * (s + 1.0) / max(1, self.warmup)
        frac = jnp.clip((s - self.warmup) / max(1, self.total - self.warmup), 0.0, 1.0)
        if self.decay == "cosine":
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * frac))
        elif self.decay == "linear":
            left = 1.0 - frac
        else:
            left = jnp.ones_like(frac)
        return jnp.where(s < self.warmup, up, self.end + (self.peak - self.end) * left)


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to: matrices, told by name and number of axes."""
    return tree.map_with_path(lambda path, x: x.ndim > 1 and path.split("/")[-1] not in VECTORS, params)


def _standard_promotion(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax mixes dtypes (bias correction, schedules); let it, without loosening the rules for our own code."""

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(init, update)
