"""LoRA (Hu et al. 2022, 2106.09685): a frozen model, and beside its kernels trained products of low rank.

Adapters are a tree of their own, `layers/<block>/<target>/{lora_a [L, in, r], lora_b [L, r, out]}`, float32: a kernel
acts as W + (alpha / r) A B. They are what has gradients, optimiser state and checkpoints. The model reads a tree
that holds both (`Base.join`); `merge` makes an ordinary tree of it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core import tree

Array = Any
Tree = Any
A, B = "lora_a", "lora_b"
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
BASE = "base/"
"""Prefix of a provider's name: what its adapters belong to, among the frozen parameters."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """rank: r. alpha: the product counts alpha / r times. targets: projections that get one, of TARGETS."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"Lora needs rank >= 1 and alpha > 0, got rank={self.rank} and alpha={self.alpha}")
        if not self.targets or (unknown := sorted(set(self.targets) - set(TARGETS))):
            raise ValueError(f"Lora.targets must be some of {', '.join(TARGETS)}, got {list(self.targets)}"
                             + (f": {unknown} are none" if self.targets else ""))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def init(self, base: Tree, rng: Array) -> Tree:
        """Fresh adapters for a tree of parameters or ShapeDtypeStructs: A uniform within 1/sqrt(in), B zero.

        Raises ValueError where the model has none of the targets.
        """
        kernels = {path.split("/")[:-1][-1]: path for path, _ in tree.paths(base) if path.endswith("/kernel")}
        if missing := [t for t in self.targets if t not in kernels]:
            raise ValueError(f"Lora.targets {missing}: the model has no such projections; it has {sorted(kernels)}")
        out: dict[str, Any] = {}
        for number, (path, kernel) in enumerate(tree.paths(base)):
            *where, name = path.split("/")
            if name != "kernel" or where[0] != "layers" or where[-1] not in self.targets:
                continue
            layers, fan_in, fan_out = kernel.shape
            here = out
            for part in where:
                here = here.setdefault(part, {})
            a = jax.random.uniform(jax.random.fold_in(rng, number), (layers, fan_in, self.rank), jnp.float32, -1.0, 1.0)
            here[A], here[B] = a / fan_in**0.5, jnp.zeros((layers, self.rank, fan_out), jnp.float32)
        return out


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["scale"])
@dataclass(frozen=True, kw_only=True)
class Base:
    """The frozen parameters that adapters belong to, and what their product is multiplied by."""

    params: Tree
    scale: float

    def join(self, adapters: Tree) -> Tree:
        """One tree for the model: the frozen parameters as they are, and the adapters, B scaled."""
        return _joined(self.params, tree.map_with_path(
            lambda path, x: x * self.scale if path.endswith(B) else x, adapters))


def _joined(base: Any, more: Any) -> Any:
    if not isinstance(base, Mapping):
        return base
    return {k: _joined(base[k], more.get(k, {})) if k in base else more[k] for k in [*base, *(set(more) - set(base))]}


def joined(params: Mapping[str, Any]) -> dict[str, Any]:
    """{provider: tree}: every provider with a "base/<provider>" beside it is joined with it."""
    bases = {name.removeprefix(BASE): base for name, base in params.items() if name.startswith(BASE)}
    return {name: bases[name].join(p) if name in bases else p for name, p in params.items()
            if not name.startswith(BASE)}


def merge(base: Tree, adapters: Tree, scale: float) -> Tree:
    """W + scale A B in float32, rounded to W's dtype; the other parameters as they are."""
    def one(kernel: Array, a: Array, b: Array) -> Array:
        wide = kernel.astype(jnp.float32) + scale * jnp.einsum("lir,lro->lio", a, b)
        return wide.astype(kernel.dtype)

    def walk(base: Any, more: Any) -> Any:
        if not isinstance(base, Mapping):
            return base
        if A in more:
            return {**base, "kernel": one(base["kernel"], more[A], more[B])}
        return {k: walk(v, more.get(k, {})) for k, v in base.items()}

    return walk(base, adapters)


def to_json(lora: Lora, base: str, step: int | None) -> dict[str, Any]:
    """What stands in a run's `model/adapter.json`: the adapters' settings, the MODEL they belong to, and of a run the
    update."""
    return {"base": base, "step": step, **dataclasses.asdict(lora)}


def from_json(found: Mapping[str, Any]) -> tuple[Lora, str, int | None]:
    """Inverse of `to_json`. Raises ValueError where something is missing."""
    try:
        return (Lora(rank=found["rank"], alpha=found["alpha"], targets=tuple(found["targets"])), found["base"],
                found["step"])
    except KeyError as e:
        raise ValueError(f"adapter.json has no {e.args[0]!r}; put back the file the run was trained with") from None
