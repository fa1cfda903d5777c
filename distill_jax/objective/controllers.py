"""Values steered by what training measures. Their state lives in the train state and is checkpointed with it.

A controller is a frozen dataclass (so a recipe can write it down) used where a term takes a number: as its `weight`
or as one of its `kwargs`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from distill_jax.core.schedules import known
from distill_jax.losses.rows.trilateral import FEATURES, parameters

Array = Any
State = Any

OWN = "own"
"""Key under which a controller finds the mean of the term it belongs to."""


@runtime_checkable
class Controller(Protocol):
    """`init() -> state` (a pytree of arrays); `value(state, step) -> f32`, a scalar where a scalar is asked for;
    `update(state, metrics, step)`.

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

    steps     updates until the ramp ends; None: the stage's
    adaptive  False: the ramp alone
    watch     name of the term whose mean loss is L; "" = the term it belongs to
    """

    steps: int | None = None
    start: float = 0.4
    stop: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True
    watch: str = ""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
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
        ramp = self.start + (self.stop - self.start) * jnp.asarray(step, jnp.float32) / known(self)
        usable = jnp.isfinite(loss) & (loss != 0)
        moves = usable & jnp.isfinite(before)
        fall = jnp.where(moves, (before - loss) / (jnp.where(moves, before, 1.0) + 1e-15), 0.0)
        momentum = self.beta * state["momentum"] + (1.0 - self.beta) * fall
        ahead = self.alpha * jax.nn.sigmoid(momentum) * (1.0 - t) if self.adaptive else 0.0
        moved = jnp.minimum(self.stop, jnp.maximum(ramp, t + ahead))
        return {"t": jnp.where(moves, moved, t), "momentum": jnp.where(moves, momentum, state["momentum"]),
                "previous": jnp.where(usable, loss, before)}


@dataclass(frozen=True, kw_only=True)
class FusionNet:
    """Parameters of the network that fuses KD and cross-entropy (`losses.rows.trilateral`): a vector as a value.

    Metrics do not move it. `train.bilevel` does, so that one more update with its ratios lowers the cross-entropy of
    held-out rows (TGeo-KD, 2312.15112; the solver is a guess, the paper's sources name none). Equal ones stay equal:
    give the same to a `Fused` term and to the term that reports its ratio.

    width     hidden units
    every     updates between two of its own
    inner_lr  eta of the update that is looked through, theta' = theta - eta grad L(theta)
    lr, decay of its own AdamW
    """

    width: int = 64
    every: int = 10
    inner_lr: float = 1e-3
    lr: float = 1e-3
    decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.width, self.every) < 1 or min(self.inner_lr, self.lr) <= 0 or self.decay < 0:
            raise ValueError(f"FusionNet needs width and every of at least 1, positive rates and no negative decay, "
                             f"got {self}")

    def init(self) -> dict[str, Array]:
        """Random first layer, zero second: every ratio is 1/2."""
        rng, size = jax.random.key(self.seed), parameters(self.width)
        first = jax.random.normal(rng, (len(FEATURES) * self.width,), jnp.float32) / len(FEATURES) ** 0.5
        zeros = lambda: jnp.zeros(size, jnp.float32)  # arrays of their own: the train state is donated
        return {"w": zeros().at[:first.shape[0]].set(first), "m": zeros(), "v": zeros(), "count": jnp.int32(0)}

    def value(self, state: dict[str, Array], step: Array) -> Array:
        return state["w"]

    def update(self, state: dict[str, Array], metrics: Mapping[str, Array], step: Array) -> dict[str, Array]:
        return state

    def moved(self, state: dict[str, Array], grad: Array) -> dict[str, Array]:
        """One update of AdamW (0.9, 0.999) from the gradient of the held-out loss; one that is not finite is skipped.
        """
        count = state["count"] + 1
        m, v = 0.9 * state["m"] + 0.1 * grad, 0.999 * state["v"] + 0.001 * grad**2
        t = count.astype(jnp.float32)
        step = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
        new = {"w": state["w"] - self.lr * (step + self.decay * state["w"]), "m": m, "v": v, "count": count}
        fine = jnp.all(jnp.isfinite(grad))
        return jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, state)


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


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The mean of another term, one update behind: KTO's z0 from a term that measures it.

    value <- decay * value + (1 - decay) * max(low, mean of `watch`); a mean that is not finite changes nothing.
    """

    watch: str
    start: float = 0.0
    low: float = 0.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"Watched.decay is in [0, 1), got {self.decay}")

    def init(self) -> Array:
        return jnp.float32(self.start)

    def value(self, state: Array, step: Array) -> Array:
        return state

    def update(self, state: Array, metrics: Mapping[str, Array], step: Array) -> Array:
        seen = _watched(self, self.watch, metrics)
        moved = self.decay * state + (1.0 - self.decay) * jnp.maximum(seen, self.low)
        return jnp.where(jnp.isfinite(seen), moved, state)


@dataclass(frozen=True, kw_only=True)
class EntropyFloor:
    """Weight of an entropy bonus that acts only while the entropy is at or below `target` nats, and grows meanwhile.

    After each update: coefficient +- `delta`, up where the measured entropy is <= target, down otherwise, kept in
    [0, high]; its value is 0 while the entropy is above (Skywork-OR1, 2505.22312, section 4).

    watch  term whose mean is the entropy or minus it (`negative_entropy`); "" = the term it belongs to
    """

    target: float = 0.2
    start: float = 0.0
    delta: float = 0.005
    high: float = 1.0
    watch: str = ""

    def __post_init__(self) -> None:
        if self.target <= 0 or self.delta <= 0 or not 0.0 <= self.start <= self.high:
            raise ValueError(f"EntropyFloor needs target, delta > 0 and 0 <= start <= high, got {self}")

    def init(self) -> dict[str, Array]:
        return {"coefficient": jnp.float32(self.start), "on": jnp.float32(1)}

    def value(self, state: dict[str, Array], step: Array) -> Array:
        return state["coefficient"] * state["on"]

    def update(self, state: dict[str, Array], metrics: Mapping[str, Array], step: Array) -> dict[str, Array]:
        seen = jnp.abs(_watched(self, self.watch or OWN, metrics))
        below = (seen <= self.target).astype(jnp.float32)
        moved = jnp.clip(state["coefficient"] + self.delta * (2.0 * below - 1.0), 0.0, self.high)
        fine = jnp.isfinite(seen)
        return {"coefficient": jnp.where(fine, moved, state["coefficient"]), "on": jnp.where(fine, below, state["on"])}


@dataclass(frozen=True, kw_only=True)
class KLTarget:
    """Weight of a KL term, steered so that the KL stays near `target` nats (Ziegler et al. 2019, 1909.08593, sec. 2.2).

    beta <- beta (1 + rate * clip((KL - target) / target, -0.2, 0.2)) after each update; `rate` 0.1 in the paper.
    `watch`: term whose mean is the KL; "" = the term it belongs to.
    """

    target: float
    start: float = 1e-3
    rate: float = 0.1
    watch: str = ""

    def __post_init__(self) -> None:
        if min(self.target, self.start, self.rate) <= 0:
            raise ValueError(f"KLTarget needs a positive target, start and rate, got {self}")

    def init(self) -> Array:
        return jnp.float32(self.start)

    def value(self, state: Array, step: Array) -> Array:
        return state

    def update(self, state: Array, metrics: Mapping[str, Array], step: Array) -> Array:
        seen = _watched(self, self.watch or OWN, metrics)
        off = jnp.clip((seen - self.target) / self.target, -0.2, 0.2)
        return jnp.where(jnp.isfinite(seen), state * (1.0 + self.rate * off), state)


def _watched(controller: Any, name: str, metrics: Mapping[str, Array]) -> Array:
    if name not in metrics:
        raise ValueError(f"{type(controller).__name__} watches {name!r}; measured: {sorted(metrics)}")
    return jax.lax.stop_gradient(metrics[name])
