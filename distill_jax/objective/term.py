"""Terms of an objective: `loss @ roles * weight * per`, and their sum over a batch. Row terms here, others beside.

How a step uses an `Objective`:
```
weights = objective.weights(batch, step, controllers)     # whole global batch: every count is final here
dynamic = objective.dynamic(step, controllers)
for each micro-batch (rows of batch and weights):         # totals and metrics add up
    total, metrics = objective.loss(sources, rows, weights_of_rows, dynamic, mesh=mesh)
controllers = objective.update(controllers, metrics, step)
```
Shapes: B rows, T tokens.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.core.batch import Batch, Stream
from distill_jax.core.head import Head
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.core.schedules import Schedule, until
from distill_jax.losses.tokens.aggregate import sequence_mean, token_mean
from distill_jax.objective.controllers import OWN, Controller
from distill_jax.objective.coupled import CoupledTerm, Given, Layer, check_coupled, coupled_values
from distill_jax.objective.lift import lift_sum
from distill_jax.objective.memory import CHUNK, Loop
from distill_jax.objective.reduce import RoleSums, by_role, means
from distill_jax.objective.rows import RowTerm
from distill_jax.objective.tokens import TokenTerm, about, about_tokens, known_tokens, local_rows, token_values

Array = Any
Controllers = dict[str, Any]

_OWN = ("tokens", "fields")
"""Targets that are in the student's own stream."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of the objective.

    loss     row loss from `losses.rows`, module-level function (logits, target, **kwargs) -> [N]
    student  "<provider>/<view>" whose logits it reads
    target   "tokens", "signals/<name>", "<provider>/<view>" of a teacher run beside the student, or "fields": what the
             stream's fields say of the token (`losses.targets.Known`)
    on       roles of the tokens it is taken on
    where    name of a stream field; only tokens at which it is not 0 are taken (and counted). "": all
    weight   factor: number, schedule or controller
    per      "token": mean over all supervised tokens of the global batch; "sequence": mean over segments of the mean
             over each segment's supervised tokens
    kwargs   keyword arguments of the loss; a schedule or controller among them is evaluated each step
    """

    loss: Callable[..., Array] = field(kw_only=False)
    student: str = "student/main"
    target: str = "tokens"
    on: tuple[Role, ...] = SUPERVISED
    where: str = ""
    weight: float | Schedule | Controller = 1.0
    per: Literal["token", "sequence"] = "token"
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise ValueError(f"Term.loss must be a row loss (a function), got {self.loss!r}")
        if self.per not in ("token", "sequence"):
            raise ValueError(f"Term.per must be 'token' or 'sequence', got {self.per!r}")
        if not self.on:
            raise ValueError(f"Term.on is empty: name the roles to train on, e.g. {[r.name for r in SUPERVISED]}")
        for name, value in (("student", self.student), ("target", self.target)):
            if value.count("/") != 1 and not (name == "target" and value in _OWN):
                others = " or signals/topk, or be tokens or fields" if name == "target" else ""
                raise ValueError(f"Term.{name} must look like 'student/main'{others}, got {value!r}")

    @property
    def view(self) -> str:
        return self.student.split("/")[1]

    @property
    def states(self) -> dict[str, tuple[Layer, ...]]:
        """{"<provider>/<view>": layers it reads of them}."""
        teacher = () if self.target in _OWN or _signal(self.target) else (self.target,)
        return dict.fromkeys((self.student, *teacher), ("final",))


AnyTerm = Term | CoupledTerm | TokenTerm

_PER = {"token": token_mean, "sequence": sequence_mean}


class Weights(NamedTuple):
    """Everything per token that multiplies a term. Leaves f32 [B,T]: slice them by rows like the batch.

    weights  {term: coefficient in the total}: role mask x token weight x signal mask x schedule / global count
    masks    {term: weight in the metrics}, without schedule and count
    """

    weights: dict[str, Array]
    masks: dict[str, Array]


@dataclass(frozen=True)
class Objective:
    """A sum of terms. Make one with `build_objective`. loop: what its row terms loop over (`memory.Loop`)."""

    terms: Mapping[str, AnyTerm]
    loop: Loop = "auto"

    @property
    def states(self) -> dict[str, tuple[Layer, ...]]:
        """{"<provider>/<view>": layers of them} that `loss` needs."""
        needed: dict[str, dict[Layer, None]] = {}
        for term in self.terms.values():
            for source, layers in term.states.items():
                needed.setdefault(source, {}).update(dict.fromkeys(layers))
        return {source: tuple(needed[source]) for source in sorted(needed)}

    @property
    def sources(self) -> tuple[str, ...]:
        """Every "<provider>/<view>" whose states `loss` needs."""
        return tuple(self.states)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the teacher signals the batch must carry."""
        return tuple(sorted({s for t in self.terms.values() if (s := _signal(t.target))}))

    def controllers(self) -> dict[str, Controller]:
        """`{"<term>.weight" or "<term>.<kwarg>": Controller}`."""
        found = {f"{name}.{key}": value for name, term in self.terms.items()
                 for key, value in {**term.kwargs, "weight": term.weight}.items()}
        return {k: v for k, v in found.items() if isinstance(v, Controller)}

    def init(self) -> Controllers:
        """State of all controllers: belongs into the train state and the checkpoint."""
        return {k: c.init() for k, c in self.controllers().items()}

    def update(self, state: Controllers, metrics: Mapping[str, RoleSums], step: Array) -> Controllers:
        """State after update `step`, from the metrics of the whole global batch."""
        measured = means(metrics)
        return {k: c.update(state[k], measured | {OWN: measured[k.rsplit(".", 1)[0]]}, step)
                for k, c in self.controllers().items()}

    def dynamic(self, step: Array, controllers: Controllers | None = None) -> dict[str, dict[str, Array]]:
        """Values of the scheduled and controlled keyword arguments at `step`, {term: {name: f32}}."""
        return {name: {k: self._value(f"{name}.{k}", v, step, controllers) for k, v in term.kwargs.items()
                       if moves(v)} for name, term in self.terms.items()}

    def weights(self, batch: Batch, step: Array, controllers: Controllers | None = None) -> Weights:
        """Token weights of every term over the whole *global* batch, before it is cut into micro-batches."""
        out = Weights({}, {})
        for name, term in self.terms.items():
            stream = batch.views[term.view]
            wanted = jnp.isin(stream.roles, jnp.asarray([int(r) for r in term.on], stream.roles.dtype))
            if signal := _signal(term.target):
                wanted &= _signal_of(batch, name, signal).mask
            if where := getattr(term, "where", ""):
                wanted &= _field(stream, name, where) != 0
            mask = jnp.where(wanted, stream.weights.astype(jnp.float32), 0.0)
            mask, count = (term.per if callable(term.per) else _PER[term.per])(mask, stream)
            factor = self._value(f"{name}.weight", term.weight, step, controllers)
            out.weights[name] = mask * (factor * jnp.where(count > 0, 1.0 / jnp.where(count > 0, count, 1.0), 0.0))
            out.masks[name] = mask
        return out

    def loss(self, sources: Mapping[str, tuple[Array, Head]], batch: Batch, weights: Weights,
             dynamic: Mapping[str, Mapping[str, Array]] | None = None, *,
             layers: Mapping[str, Mapping[Layer, Array]] | None = None, trainable: tuple[str, ...] | None = None,
             mesh: Mesh | None = None, chunk: int = CHUNK) -> tuple[Array, dict[str, RoleSums]]:
        """(total, {term: RoleSums}) of these rows; `weights` are those rows of `self.weights(global batch)`.

        sources {"student/main": (hidden [B,T,D], Head)} for every name in `self.sources`; `layers` further states of
        them, {"student/main": {layer: [B,T,D]}}, as `self.states` says. `trainable` as in `lift_sum`. Raises
        ValueError when a source, layer or signal is missing.
        """
        missing = [s for s, needed in self.states.items() if "final" in needed and s not in sources]
        if missing:
            raise ValueError(f"the objective needs hidden states of {missing}; given: {sorted(sources)}")
        settings = {n: _settings(t, (dynamic or {}).get(n, {})) for n, t in self.terms.items()}
        tokenwise = {n: t for n, t in self.terms.items() if isinstance(t, TokenTerm)}
        known = known_tokens(tokenwise, sources, batch, weights.masks, mesh=mesh, chunk=chunk)
        rows = local_rows(tokenwise)
        values = token_values({n: t for n, t in tokenwise.items() if n not in rows}, known, settings, sources, batch,
                              trainable=trainable, mesh=mesh, chunk=chunk)
        for name, term in self.terms.items():
            if isinstance(term, CoupledTerm):
                values[name] = coupled_values(term, Given(sources, layers or {}), batch, settings[name][1],
                                              trainable=trainable, mesh=mesh)
            elif isinstance(term, Term):
                rows[name] = RowTerm(loss=term.loss, source=term.student, target=term.target)
                if term.target == "fields":
                    known[name] = about_tokens(batch.views[term.view], weights.masks[name])
                    rows[name] = replace(rows[name], target=f"signals/{about(name)}")
        stop = jax.lax.stop_gradient
        totals = [jnp.sum(stop(weights.weights[n]).astype(v.dtype) * v) for n, v in values.items()]
        metrics = {n: by_role(stop(v), weights.masks[n], batch.views[self.terms[n].view].roles)
                   for n, v in values.items()}
        for view in sorted({self.terms[n].view for n in rows}):
            terms = {n: replace(r, kwargs=settings[n][0], dynamic=settings[n][1]) for n, r in rows.items()
                     if self.terms[n].view == view}
            needed = {t.source for t in terms.values()} | {t.target for t in terms.values()}
            stream: Stream = batch.views[view]
            signals = (batch.signals if view == "main" else {}) | {about(n): known[n] for n in terms if n in known}
            part, measured = lift_sum(
                {s: x for s, x in sources.items() if s in needed}, terms, weights.weights, tokens=stream.tokens,
                signals=signals, roles=stream.roles, masks=weights.masks, trainable=trainable, mesh=mesh, chunk=chunk,
                loop=self.loop)
            totals.append(part)
            metrics |= measured
        return sum(totals[1:], start=totals[0]), metrics

    def _value(self, key: str, value: Any, step: Array, controllers: Controllers | None) -> Array:
        if isinstance(value, Controller):
            if controllers is None or key not in controllers:
                raise ValueError(f"no state for controller {key!r}; make it with Objective.init(), got "
                                 f"{sorted(controllers or {})}")
            value = value.value(controllers[key], step)
        elif callable(value):
            value = value(step)
        return jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))


def build_objective(terms: Mapping[str, AnyTerm], steps: int | None = None, loop: Loop = "auto") -> Objective:
    """Check the terms against each other. steps: updates of the stage, for schedules that run to its end; loop: as of
    `Objective`. Raises ValueError when there is no term or a name cannot be used."""
    if not terms:
        raise ValueError("an objective needs at least one term")
    if steps is not None:
        terms = {name: _until(term, steps) for name, term in terms.items()}
    for name, term in terms.items():
        if name == OWN or "/" in name or "." in name:
            raise ValueError(f"term name {name!r} cannot be used: no '/' or '.', and not {OWN!r}")
        if _signal(term.target) and term.view != "main":
            raise ValueError(f"term {name!r}: signals are aligned with view 'main', its student reads {term.view!r}")
        if isinstance(term, CoupledTerm):
            check_coupled(name, term)
        elif term.target not in _OWN and not _signal(term.target) and term.target.split("/")[1] != term.view:
            raise ValueError(f"term {name!r} compares {term.student!r} with {term.target!r}, but the tokens of two "
                             "views differ; use one view on both sides")
    return Objective(dict(terms), loop)


def _until(term: AnyTerm, steps: int) -> AnyTerm:
    kwargs = {k: until(v, steps) for k, v in term.kwargs.items()}
    return replace(term, weight=until(term.weight, steps), kwargs=kwargs)


def moves(value: Any) -> bool:
    """Whether a weight or keyword argument is a schedule or controller, evaluated each step."""
    return isinstance(value, Controller | Schedule) and not inspect.isroutine(value)


def _settings(term: AnyTerm, dynamic: Mapping[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
    """(constant, moving) keyword arguments of the loss. Raises ValueError where `dynamic` lacks one that moves."""
    if lacking := sorted(k for k, v in term.kwargs.items() if moves(v) and k not in dynamic):
        raise ValueError(f"no value for {lacking} of {term.loss.__name__}; pass Objective.dynamic(step, controllers)")
    return {k: v for k, v in term.kwargs.items() if not moves(v)}, dict(dynamic)


def _signal(target: str) -> str:
    return target.removeprefix("signals/") if target.startswith("signals/") else ""


def _field(stream: Stream, term: str, name: str) -> Array:
    if name not in stream.fields:
        raise ValueError(f"term {term!r} is taken where the field {name!r} is not 0; the batch has "
                         f"{sorted(stream.fields)}")
    return jnp.asarray(stream.fields[name])


def _signal_of(batch: Batch, term: str, name: str) -> Any:
    if name not in batch.signals:
        raise ValueError(f"term {term!r} needs signal {name!r}; the batch carries {sorted(batch.signals)}. "
                         "Score the store with a teacher, or change the term's target")
    return batch.signals[name]
