"""Optimisers as frozen specs: a recipe writes one down, `build` turns it into an optax transformation."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from distill_jax.core import tree
from distill_jax.train.moments import State, scale_by_adam, select

Array = Any
VECTORS = ("bias", "scale")
"""Last path component of parameters that are vectors in every layer (with scanned layers they have two axes)."""


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """What all optimisers have: a learning rate with warm-up and decay, and clipping by global norm.

    peak_lr       learning rate at the end of the warm-up
    warmup        updates of linear warm-up; a value below 1 is a share of all updates
    decay         shape after the warm-up; "cosine" and "linear" end at `end_factor * peak_lr`
    weight_decay  decoupled, applied to matrices only: never to biases, norm scales or other vectors
    grad_clip     largest global gradient norm; None: no clipping
    selects       of the class: `rule` itself leaves its arrays as they were where an update is not `ok`

    A new one: a subclass with `rule`, and a line in its test.
    """

    selects: ClassVar[bool] = False

    peak_lr: float = 3e-4
    warmup: float = 0.03
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    end_factor: float = 0.1
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.decay not in ("cosine", "linear", "constant"):
            raise ValueError(f"{name}.decay must be cosine, linear or constant, got {self.decay!r}")
        if self.peak_lr < 0 or self.warmup < 0 or not 0 <= self.end_factor <= 1:
            raise ValueError(f"{name} needs peak_lr >= 0, warmup >= 0 and end_factor in [0, 1], got {self}")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"{name}.grad_clip must be positive, or None for no clipping, got {self.grad_clip}")

    def schedule(self, total_steps: int) -> "Schedule":
        """The learning rate by update."""
        warmup = round(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)
        return Schedule(peak=self.peak_lr, warmup=min(warmup, total_steps), total=total_steps, decay=self.decay,
                        end=self.end_factor * self.peak_lr)

    def build(self, total_steps: int) -> optax.GradientTransformationExtraArgs:
        """The optax transformation; its `init` and `update` are safe under strict dtype promotion.

        `update(..., ok=False)` leaves the state as it was; None, the default, is True.
        """
        with jax.numpy_dtype_promotion("standard"):
            parts = [] if self.grad_clip is None else [optax.clip_by_global_norm(self.grad_clip)]
            return _standard_promotion(optax.chain(*parts, self.rule(self.schedule(total_steps))), self.selects)

    @abstractmethod
    def rule(self, schedule: "Schedule") -> optax.GradientTransformation:
        """From clipped gradients to what is added to the parameters."""

    def state_bytes(self, shapes: Any) -> int:
        """Bytes of the state for a tree of parameters (arrays or ShapeDtypeStructs), counters left out; nothing is
        computed."""
        return tree.nbytes([x for x in jax.tree.leaves(jax.eval_shape(self.build(1).init, shapes)) if x.ndim])

    def _finish(self, direction: optax.GradientTransformation, schedule: "Schedule") -> optax.GradientTransformation:
        """Decoupled weight decay and the learning rate after a direction."""
        return optax.chain(direction, optax.add_decayed_weights(self.weight_decay, decay_mask),
                           optax.scale_by_learning_rate(schedule))


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019). `state`: what the moments are kept in, 8, 4 or 2.1 bytes a parameter
    (`train.moments`: rounded at random where they are not float32)."""

    selects: ClassVar[bool] = True
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    state: State = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state not in get_args(State):
            raise ValueError(f"AdamW.state must be one of {', '.join(get_args(State))}, got {self.state!r}")

    def rule(self, schedule: "Schedule") -> optax.GradientTransformation:
        return self._finish(scale_by_adam(self.b1, self.b2, self.eps, self.state), schedule)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018), optax's: second moments of matrices as a row and a column, no first moment.

    b2_power   second moments decay by 1 - t^-b2_power
    clip       largest root mean square of an update before the learning rate (of a parameter: with scanned layers, of
               all layers' together)
    relative   the learning rate is multiplied by the root mean square of the parameter, as in the paper (then 1e-2)
    factored   axes from this length on are factored
    """

    b2_power: float = 0.8
    clip: float = 1.0
    relative: bool = False
    factored: int = 128

    def rule(self, schedule: "Schedule") -> optax.GradientTransformation:
        parts = [optax.scale_by_factored_rms(decay_rate=self.b2_power, min_dim_size_to_factor=self.factored),
                 optax.clip_by_block_rms(self.clip)]
        if self.relative:
            parts.append(optax.scale_by_param_block_rms())
        return self._finish(optax.chain(*parts), schedule)


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon (Jordan 2024) as scaled in Moonlight (2502.16982, eq. 4): the momentum of every matrix of a layer is made
    orthogonal, times 0.2 sqrt(max(in, out)), so that AdamW's learning rates and decay fit. The iteration is optax's.

    Embeddings, head and vectors are AdamW's, at the same learning rate, with b1, b2 and eps. Kernels of scanned layers
    [L, in, out] are L matrices. Adapters of LoRA are matrices like others.
    """

    momentum: float = 0.95
    iterations: int = 5
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def rule(self, schedule: "Schedule") -> optax.GradientTransformation:
        numbers = lambda params: jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)
        muon = optax.chain(optax.contrib.scale_by_muon(ns_steps=self.iterations, beta=self.momentum, eps=self.eps,
                                                       weight_dimension_numbers=numbers), optax.stateless(_as_large))
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        rest = lambda params: jax.tree.map(lambda x: not x, layer_matrices(params))
        return self._finish(optax.chain(optax.masked(muon, layer_matrices), optax.masked(adam, rest)), schedule)


def _as_large(directions: Any, params: Any) -> Any:
    """Orthogonal directions with the root mean square of an AdamW update, about 0.2."""
    return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, directions)


def layer_matrices(params: Any) -> Any:
    """True for the matrices of layers, False for embeddings, head and vectors."""
    return tree.map_with_path(lambda path, matrix: matrix and not path.startswith(("embed/", "lm_head/")),
                              decay_mask(params))


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


def _standard_promotion(tx: optax.GradientTransformation, selects: bool) -> optax.GradientTransformationExtraArgs:
    """optax mixes dtypes (bias correction, schedules); let it, without loosening the rules for our own code.
    selects: `tx` itself leaves its arrays as they were where ok is False, so that only counters are left to do."""
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None, *, ok: Array | None = None, **_: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, new = inner.update(updates, state, params, ok=ok)
        one = lambda n, o: n if selects and n.ndim else select(ok, n, o)
        return updates, jax.tree.map(one, new, state)

    return optax.GradientTransformationExtraArgs(init, update)
