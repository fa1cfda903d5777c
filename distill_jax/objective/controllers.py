"""Values steered by what training measures. Their state lives in the train state and is checkpointed with it.

A controller is a frozen dataclass (so a recipe can write it down) used where a term takes a number: as its `weight`
or as one of its `kwargs`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Array = Any
State = Any

OWN = "own"
"""Key under which a controller finds the mean of the term it belongs to."""


@runtime_checkable
class Controller(Protocol):
    """`init() -> state` (a pytree of arrays); `value(state, step) -> f32 scalar`; `update(state, metrics, step)`.

    `update` runs once an update step, inside the jitted step, on global means: `metrics` holds every term's mean loss
    by name, by name and role ("kd/think"), and the controller's own term under `OWN`.
    """

    def init(self) -> State: ...
    def value(self, state: State, step: Array) -> Array: ...
    def update(self, state: State, metrics: Mapping[str, Array], step: Array) -> State: ...


@dataclass(frozen=True, kw_only=True)
class TAIDSchedule:
    """TAID's interpolation coefficient t: at least a linear ramp, faster while the loss falls (2501.16937, sec. 3.3).

    With L' the loss of the step before: d = (L' - L) / L', m <- beta m + (1-beta) d, and
    t <- min(stop, max(ramp(step), t + alpha sigmoid(m) (1 - t))), ramp from `start` to `stop` over `steps` updates.
    The first update only remembers the loss; so does one whose loss is not finite or zero (nothing counted).

    steps     updates until the ramp ends
    adaptive  False: the ramp alone
    watch     name of the term whose mean loss is L; "" = the term it belongs to
    """

    steps: int
    start: float = 0.4
    stop: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True
    watch: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"TAIDSchedule.steps must be at least 1, got {self.steps}")
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(f"TAIDSchedule needs 0 <= start <= stop <= 1, got start={self.start}, stop={self.stop}")

    def init(self) -> dict[str, Array]:
        return {"t": jnp.float32(self.start), "momentum": jnp.float32(0), "previous": jnp.float32(jnp.inf)}

    def value(self, state: dict[str, Array], step: Array) -> Array:
        return state["t"]

    def update(self, state: dict[str, Array], metrics: Mapping[str, Array], step: Array) -> dict[str, Array]:
        """State after update number `step` (from 0)."""
        key = self.watch or OWN
        if key not in metrics:
            raise ValueError(f"TAIDSchedule watches {key!r}; measured: {sorted(metrics)}")
        loss, before, t = jax.lax.stop_gradient(metrics[key]), state["previous"], state["t"]
        ramp = self.start + (self.stop - self.start) * jnp.asarray(step, jnp.float32) / self.steps
        usable = jnp.isfinite(loss) & (loss != 0)
        known = usable & jnp.isfinite(before)
        fall = jnp.where(known, (before - loss) / (jnp.where(known, before, 1.0) + 1e-15), 0.0)
        momentum = self.beta * state["momentum"] + (1.0 - self.beta) * fall
        ahead = self.alpha * jax.nn.sigmoid(momentum) * (1.0 - t) if self.adaptive else 0.0
        moved = jnp.minimum(self.stop, jnp.maximum(ramp, t + ahead))
        return {"t": jnp.where(known, moved, t), "momentum": jnp.where(known, momentum, state["momentum"]),
                "previous": jnp.where(usable, loss, before)}
