"""One table from names to mesh axes: regexes over parameter paths, and names of activations.

Model code only names things (`constrain(x, "heads")`); which axis a dimension lies on is decided here.
A dimension that its axes do not divide stays unsharded, so one table serves every model and mesh.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill_jax.core.tree import map_with_path
from distill_jax.sharding.mesh import ROW_AXES

P = PartitionSpec

# Layer parameters carry a leading layer dimension (they are scanned over); it is never sharded.
PARAMS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"lm_head/kernel$", P("tensor", "fsdp")),
    (r"layers/attention/[qkv]/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/attention/[qkv]/bias$", P(None, "tensor")),
    (r"layers/attention/o/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_a$", P(None, "fsdp")),
    (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_b$", P(None, None, "tensor")),
    (r"layers/(attention/o|mlp/down)/lora_a$", P(None, "tensor")),
    (r"layers/(attention/o|mlp/down)/lora_b$", P(None, None, "fsdp")),
    (r"layers/mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"layers/mlp/down/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/moe/(gate|up)/kernel$", P(None, "expert", "fsdp", "tensor")),
    (r"layers/moe/down/kernel$", P(None, "expert", "tensor", "fsdp")),
    (r"", P()),  # norms and everything small: replicated
)

ACTIVATIONS: Mapping[str, PartitionSpec] = {
    "tokens": P(ROW_AXES, "context"),  # [B, T]
    "hidden": P(ROW_AXES, "context", None),  # [B, T, D]
    "heads": P(ROW_AXES, "tensor", "context", None),  # [B, H, T, head_dim]
    "mlp": P(ROW_AXES, "context", "tensor"),  # [B, T, F]
    "logits": P(ROW_AXES, "context", "tensor"),  # [B, T, V]
    "cache": P(None, ROW_AXES, "tensor", None, None),  # [L, B, K, S, head_dim]
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """params: ordered (regex searched in "a/b/c", spec), the first match wins; activations: spec by name."""

    params: Sequence[tuple[str, PartitionSpec]] = PARAMS
    activations: Mapping[str, PartitionSpec] = field(default_factory=lambda: dict(ACTIVATIONS))

    def param_spec(self, path: str) -> PartitionSpec:
        return next((spec for pattern, spec in self.params if re.search(pattern, path)), P())

    def activation_spec(self, name: str) -> PartitionSpec:
        if name not in self.activations:
            raise ValueError(f"no sharding rule for activation {name!r}; known: {sorted(self.activations)}")
        return self.activations[name]


DEFAULT_RULES = Rules()
_active: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=DEFAULT_RULES)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """`constrain` follows `rules` inside the block (while a function is being traced)."""
    token = _active.set(rules)
    try:
        yield
    finally:
        _active.reset(token)


def fit_spec(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """`spec` cut to the axes in `sizes` and to the dimensions they divide; the rest is unsharded."""
    out: list[Any] = []
    for dim, entry in zip(shape, spec):
        wanted: list[str] = [entry] if isinstance(entry, str) else list(entry or ())
        axes = [a for a in wanted if sizes.get(a, 1) > 1]
        keep = axes and dim % math.prod(sizes[a] for a in axes) == 0
        out.append(None if not keep else tuple(axes) if len(axes) > 1 else axes[0])
    while out and out[-1] is None:
        out.pop()
    return P(*out)


def entries(spec: PartitionSpec, length: int) -> list[Any]:
    """The first `length` entries of a spec; those it leaves out are None."""
    return [*spec, *[None] * length][:length]


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def param_shardings(mesh: Mesh, shapes: Any, rules: Rules = DEFAULT_RULES) -> Any:
    """A NamedSharding for every leaf (array or ShapeDtypeStruct) of a parameter tree, by its path.

    Also right for trees that contain such a tree, like optimiser moments: the regexes match the end of a path.
    """
    def one(path: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, fit_spec(rules.param_spec(path), leaf.shape, mesh.shape))

    return map_with_path(one, shapes)


def constrain(x: Any, name: str) -> Any:
    """Pin the layout of activation `name` under the mesh set with `jax.set_mesh`; without one, `x` itself.

    Inside `shard_map` the axes it maps over are left alone: there `x` already is one shard.
    """
    spec = active_rules().activation_spec(name)
    if not (sizes := auto_axes()):
        return x
    assert x.ndim == len(spec), f"activation {name!r} has {x.ndim} dimensions, its rule {spec} has {len(spec)}"
    return jax.lax.with_sharding_constraint(x, fit_spec(spec, x.shape, sizes))


def active_rules() -> Rules:
    """The table in force: of `use_rules`, or the default one."""
    return _active.get()


def auto_axes() -> dict[str, int]:
    """{axis: size} of the mesh set with `jax.set_mesh`: axes of several devices that no `shard_map` maps over."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
            if kind == AxisType.Auto and size > 1}
