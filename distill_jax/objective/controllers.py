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


@dataclass(frozen=True, kw_only=True)
class EntropyQuantile:
    """A threshold in nats that a share of the tokens exceeds: the (1 - share) quantile of the student's entropy.

    With b the share measured at the threshold of this step: threshold <- threshold * exp(rate (b - share)), kept in
    [low, high] (Andrew et al. 2021, 1905.03871, algorithm 1, there for gradient norms). Every update is one step
    behind the student, and depends on means of the global batch alone.

    share  part of the tokens to be above the threshold
    watch  term that measures it, of loss `losses.rows.selective.uncertain` on the same tokens and with an equal
           controller as its threshold: equal controllers that watch one term stay equal
    rate   0.2 in the paper
    """

    share: float = 0.2
    watch: str = "uncertain"
    start: float = 1.0
    rate: float = 0.2
    low: float = 1e-4
    high: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0 or self.rate <= 0:
            raise ValueError(f"EntropyQuantile needs a share in (0, 1] and a positive rate, got {self.share} and "
                             f"{self.rate}")
        if not 0.0 < self.low <= self.start <= self.high:
            raise ValueError(f"EntropyQuantile needs 0 < low <= start <= high, got low={self.low}, start={self.start}, "
                             f"high={self.high}")

    def init(self) -> Array:
        return jnp.float32(self.start)

    def value(self, state: Array, step: Array) -> Array:
        return state

    def update(self, state: Array, metrics: Mapping[str, Array], step: Array) -> Array:
        """The threshold after update number `step`; a share that is not finite changes nothing."""
        if self.watch not in metrics:
            raise ValueError(f"EntropyQuantile watches the term {self.watch!r}; measured: {sorted(metrics)}. Add "
                             f"Term(uncertain, weight=0.0) under that name")
        above = jax.lax.stop_gradient(metrics[self.watch])
        moved = jnp.clip(state * jnp.exp(self.rate * (above - self.share)), self.low, self.high)
        return jnp.where(jnp.isfinite(above), moved, state)
