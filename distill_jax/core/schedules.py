"""Values that change over the run: plain frozen dataclasses, so that a recipe can write them to YAML.

A schedule is called with the update step (int or traced int32) and returns a float32 scalar. `steps=None` means: to the
end of the stage it is used in.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

Array = Any


@runtime_checkable
class Schedule(Protocol):
    def __call__(self, step: Array) -> Array: ...


def until(value: Any, steps: int) -> Any:
    """`value` with its `steps` filled in, where it is a schedule or controller that leaves them to the stage."""
    return replace(value, steps=steps) if getattr(value, "steps", steps) is None else value


def known(value: Any) -> int:
    """`value.steps`. Raises ValueError where they are left to a stage and there is none."""
    if value.steps is None:
        raise ValueError(f"{type(value).__name__}.steps is not known outside of a stage: give a number of updates")
    return value.steps


@dataclass(frozen=True, kw_only=True)
class Constant:
    value: float

    def __call__(self, step: Array) -> Array:
        return jnp.float32(self.value)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """From `start` to `stop` over `steps` updates, then constant."""

    start: float
    stop: float
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Linear.steps must be at least 1, got {self.steps}")

    def __call__(self, step: Array) -> Array:
        frac = jnp.clip(jnp.asarray(step, jnp.float32) / known(self), 0.0, 1.0)
        return self.start + (self.stop - self.start) * frac


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear from 0 to `peak` over `warmup` updates, then cosine to `end` at update `total`."""

    peak: float
    warmup: int
    total: int
    end: float = 0.0

    def __call__(self, step: Array) -> Array:
        s = jnp.asarray(step, jnp.float32)
        up = self.peak * (s + 1.0) / max(1, self.warmup)
        frac = jnp.clip((s - self.warmup) / max(1, self.total - self.warmup), 0.0, 1.0)
        down = self.end + 0.5 * (self.peak - self.end) * (1.0 + jnp.cos(jnp.pi * frac))
        return jnp.where(s < self.warmup, up, down)


def at(value: "float | Schedule", step: Array) -> Array:
    """The value of a number or schedule at `step`, as a float32 scalar."""
    return value(step) if callable(value) else jnp.float32(value)
