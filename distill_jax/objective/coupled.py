"""Terms that are not row-wise: a token's value depends on other tokens, or on states that are no logits.

A `CoupledTerm` names a group loss (`losses.groups`), the states it reads on both sides, and everything else as a
`Term` does: roles, weight, normalisation, moving kwargs. Its loss gives one value a token, and the term's share of the
total is sum_t weight_t * value_t with the same weights, made from the whole global batch. So where the values are
(hidden states, relations, transport: tokens of one document at most) the gradient does not depend on micro-batches,
packing or devices. Losses that couple all rows (Sinkhorn, CKA) have one value a group, that of the rows of one device
(`scope="device"`) or of all devices (`scope="global"`) in one micro-batch, which counts by the group's share of the
weights; the mathematics of these do depend on how the batch is cut, and only there.

Shapes: B rows, T tokens, D width.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from distill_jax.core.batch import Batch, Signal, Stream
from distill_jax.core.head import Head
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.core.schedules import Schedule
from distill_jax.losses.groups.states import States
from distill_jax.objective.controllers import Controller
from distill_jax.objective.lift import shift, unshift
from distill_jax.sharding.mesh import ROW_AXES

Array = Any

Layer = int | Literal["embedding", "final"]
"""A layer's output by number (from 0, negative from the end), what the first layer reads, or what the head reads."""

LayerMap = tuple[tuple[Layer, Layer], ...]


@dataclass(frozen=True, kw_only=True)
class CoupledTerm:
    """One part of the objective that is not row-wise.

    loss     group loss from `losses.groups`, module-level function (student, teacher, **kwargs) -> [B,T]
    student  "<provider>/<view>" whose states it moves; a Projector's where the widths differ
    target   "<provider>/<view>" of a teacher run beside the student, or "signals/<name>"
    layers   pairs (student's layer, teacher's layer); the term is the mean over pairs. See `Layer`
    on       roles of the tokens it is taken on
    weight   factor: number, schedule or controller
    per      "token": mean over all supervised tokens of the global batch; "sequence": mean over segments of the mean
             over each segment's supervised tokens
    scope    what a loss that couples rows sees of a micro-batch: the rows of one "device", or all of them ("global")
    kwargs   keyword arguments of the loss; a schedule or controller among them is evaluated each step
    """

    loss: Callable[..., Array] = field(kw_only=False)
    student: str = "student/main"
    target: str = "teacher/main"
    layers: LayerMap = (("final", "final"),)
    on: tuple[Role, ...] = SUPERVISED
    weight: float | Schedule | Controller = 1.0
    per: Literal["token", "sequence"] = "token"
    scope: Literal["device", "global"] = "device"
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise ValueError(f"CoupledTerm.loss must be a group loss (a function), got {self.loss!r}")
        for name in ("student", "target"):
            if getattr(self, name).count("/") != 1:
                raise ValueError(f"CoupledTerm.{name} must look like 'student/main', got {getattr(self, name)!r}")
        if not self.layers or any(len(pair) != 2 for pair in self.layers):
            raise ValueError(f"CoupledTerm.layers must be pairs (student's layer, teacher's layer), got {self.layers}")
        if not self.on:
            raise ValueError("CoupledTerm.on is empty: name the roles to train on, e.g. "
                             f"{[r.name for r in SUPERVISED]}")
        if self.per not in ("token", "sequence") or self.scope not in ("device", "global"):
            raise ValueError("CoupledTerm.per must be 'token' or 'sequence' and scope 'device' or 'global', got "
                             f"{self.per!r} and {self.scope!r}")
        if self.scope == "global" and "axes" not in inspect.signature(self.loss).parameters:
            raise ValueError(f"scope='global' has no meaning for {_name(self.loss)}: its tokens depend on tokens of "
                             "their own document only")
        if self.signal and len(self.layers) > 1:
            raise ValueError(f"a layer map needs a teacher with layers, and {self.target!r} is a stored signal")

    @property
    def view(self) -> str:
        return self.student.split("/")[1]

    @property
    def signal(self) -> str:
        """Name of the stored signal it reads; "" where the target is a provider."""
        return self.target.removeprefix("signals/") if self.target.startswith("signals/") else ""

    @property
    def states(self) -> dict[str, tuple[Layer, ...]]:
        """{"<provider>/<view>": layers it reads of them}."""
        out: dict[str, tuple[Layer, ...]] = {self.student: tuple(pair[0] for pair in self.layers)}
        if not self.signal:
            theirs: tuple[Layer, ...] = tuple(pair[1] for pair in self.layers)
            out[self.target] = out.get(self.target, ()) + theirs
        return out


def check_coupled(name: str, term: CoupledTerm) -> None:
    """Raises ValueError where the sides of a term cannot be brought together."""
    view = "main" if term.signal else term.target.split("/")[1]
    if view != term.view and not getattr(term.loss, "any_view", False):
        raise ValueError(f"term {name!r} compares {term.student!r} with {term.target!r} token by token, but the tokens "
                         f"of two views differ; use one view on both sides, or a loss that aligns them")


class Given(NamedTuple):
    """What terms are computed from: {"<provider>/<view>": (final states [B,T,D], Head)} and further layers by number
    or name, {"<provider>/<view>": {layer: [B,T,D]}}."""

    sources: Mapping[str, tuple[Array, Head]]
    layers: Mapping[str, Mapping[Layer, Array]]

    def state(self, source: str, layer: Layer) -> Array:
        """Raises ValueError where nobody has made it."""
        found = self.layers.get(source, {})
        if layer in found:
            return found[layer]
        if layer != "final" or source not in self.sources:
            raise ValueError(f"no layer {layer!r} of {source!r}; given: {sorted(self.sources)} and layers "
                             f"{ {s: sorted(map(str, x)) for s, x in self.layers.items()} }")
        return self.sources[source][0]


def coupled_values(term: CoupledTerm, given: Given, batch: Batch, dynamic: Mapping[str, Array], *,
                   trainable: tuple[str, ...] | None = None, mesh: Mesh | None = None) -> Array:
    """The loss at every token of the student's view, f32 [B,T] aligned with tokens, 0 where the term is not taken.

    `trainable` as in `lift_sum`; the target gets no gradient. Rows are spread over `mesh`.
    """
    stop = jax.lax.stop_gradient
    moving = trainable is None or term.student in trainable
    mine = {str(x): _placed(given.state(term.student, x), x) for x, _ in term.layers}
    student = _Side(mine if moving else stop(mine), *_fields(term, batch.views[term.view]))
    if term.signal:
        signal = shift(stop(batch.signals[term.signal]))
        student = student._replace(mask=student.mask & signal.mask)
        teacher = student._replace(layers={}, signal=signal)
    else:
        theirs = {str(x): stop(_placed(given.state(term.target, x), x)) for _, x in term.layers}
        teacher = _Side(theirs, *_fields(term, batch.views[term.target.split("/")[1]]))
    heads: tuple[Head | None, Head | None] = (None, None)
    if getattr(term.loss, "needs_head", False):
        head = given.sources[term.student][1]
        heads = (head if moving else stop(head), None if term.signal else stop(given.sources[term.target][1]))
    local = _Local(term, () if mesh is None or term.scope == "device" else _rows(mesh))
    values = _spread(local, mesh, (student, teacher), (heads, {k: stop(v) for k, v in dynamic.items()}))
    return unshift(values)


class _Side(NamedTuple):
    """States by layer and fields of one side, [B,T,...]; the fields are those of the token that a state predicts."""

    layers: dict[str, Array]
    mask: Array
    segment_ids: Array
    signal: Signal | None = None

    def states(self, layer: Layer, head: Head | None) -> States:
        return States(x=self.layers.get(str(layer)), mask=self.mask, segment_ids=self.segment_ids, head=head,
                      signal=self.signal)


@dataclass(frozen=True)
class _Local:
    """The computation of one device over its rows."""

    term: CoupledTerm
    axes: tuple[str, ...]

    def __call__(self, sides: tuple[_Side, _Side],
                 shared: tuple[tuple[Head | None, Head | None], dict[str, Array]]) -> Array:
        (student, teacher), (heads, dynamic) = sides, shared
        kwargs = {k: v for k, v in self.term.kwargs.items() if k not in dynamic} | dynamic
        if self.axes:
            kwargs |= {"axes": self.axes}
        values = [self.term.loss(student.states(a, heads[0]), teacher.states(b, heads[1]), **kwargs)
                  for a, b in self.term.layers]
        return sum(values[1:], start=values[0]) / len(values)


def _spread(local: _Local, mesh: Mesh | None, sides: Any, shared: Any) -> Array:
    """`local` over the rows of each device. Automatic sharding would gather the rows for every loop over them."""
    if mesh is None:
        return local(sides, shared)
    by_row, everywhere = PartitionSpec(_rows(mesh) or None), PartitionSpec()
    size = 1
    for axis in _rows(mesh):
        size *= mesh.shape[axis]
    rows = sides[0].mask.shape[0]
    if extra := -rows % size:
        sides = jax.tree.map(lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)), sides)
    return jax.shard_map(local, mesh=mesh, check_vma=False, in_specs=(by_row, everywhere),
                         out_specs=by_row)(sides, shared)[:rows]


def _rows(mesh: Mesh) -> tuple[str, ...]:
    return tuple(a for a in mesh.axis_names if a in ROW_AXES)


def _fields(term: CoupledTerm, stream: Stream) -> tuple[Array, Array]:
    """(mask, segment_ids) of the tokens a term is taken on, shifted onto the states that predict them."""
    on = jnp.isin(stream.roles, jnp.asarray([int(r) for r in term.on], stream.roles.dtype))
    return shift((on & (jnp.asarray(stream.weights) > 0), jnp.asarray(stream.segment_ids)))


def _placed(x: Array, layer: Layer) -> Array:
    """Embeddings belong to their own token, all other states to the token they predict."""
    return shift(x) if layer == "embedding" else x


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", str(loss))
