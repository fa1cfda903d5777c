"""Terms on the log-probabilities of the tokens that stand there: policy gradients, KL, entropy, preferences.

A `TokenTerm` names a token loss (`losses.tokens`), whose log-probs it trains, and those of which model it may compare
them with; everything else as a `Term` does. The log-probs and entropies of a source are lifted once for all terms
that read it (`lift.lift_tokens`: chunk by chunk, recomputed in the backward), then the losses run on [B,T]. The
term's share of the total is sum_t weight_t value_t with weights made from the whole global batch, and a value depends
on tokens of its own row at most, so the gradient does not depend on micro-batches, packing (as long as a pair is in
one row) or devices.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.core.batch import Batch, Stream, TokenLogprob
from distill_jax.core.head import Head
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.core.schedules import Schedule
from distill_jax.losses.tokens.inputs import Tokens
from distill_jax.losses.tokens.measures import clip_fraction, entropy, logprob_gap, mean_ratio
from distill_jax.losses.tokens.ratios import BEHAVIOUR, Level
from distill_jax.objective.controllers import Controller
from distill_jax.objective.coupled import Layer
from distill_jax.objective.lift import lift_tokens
from distill_jax.objective.reduce import RoleSums, by_role

Array = Any

Aggregation = Callable[[Array, Stream], tuple[Array, Array]]
"""`losses.tokens.aggregate`: (mask [B,T], stream) -> (shares [B,T], count)."""


@dataclass(frozen=True, kw_only=True)
class TokenTerm:
    """One part of the objective that is made of log-probabilities.

    loss     token loss from `losses.tokens`: module-level function or frozen dataclass, (tokens, **kwargs) -> [B,T]
    student  "<provider>/<view>" whose log-probs it trains
    target   "tokens": none. "<provider>/<view>" of a reference run beside the student, or "signals/<name>" of kind
             token, whose log-probs of the same tokens the loss finds as `tokens.reference`
    on       roles of the tokens it is taken on
    where    name of a stream field; only tokens at which it is not 0 are taken (and counted). "": all
    weight   factor: number, schedule or controller
    per      "token": mean over all its tokens of the global batch; "sequence": mean over segments of the mean over each
             segment's tokens; or an aggregation of `losses.tokens.aggregate`
    kwargs   keyword arguments of the loss; a schedule or controller among them is evaluated each step

    A term of weight 0 with a loss of `losses.tokens.measures` only reports.
    """

    loss: Callable[..., Array] = field(kw_only=False)
    student: str = "student/main"
    target: str = "tokens"
    on: tuple[Role, ...] = SUPERVISED
    where: str = ""
    weight: float | Schedule | Controller = 1.0
    per: Literal["token", "sequence"] | Aggregation = "token"
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise ValueError(f"TokenTerm.loss must be a token loss (a function), got {self.loss!r}")
        if not self.on:
            raise ValueError(f"TokenTerm.on is empty: name the roles to train on, e.g. {[r.name for r in SUPERVISED]}")
        if not callable(self.per) and self.per not in ("token", "sequence"):
            raise ValueError(f"TokenTerm.per must be 'token', 'sequence' or an aggregation, got {self.per!r}")
        for name, value in (("student", self.student), ("target", self.target)):
            if value.count("/") != 1 and not (name == "target" and value == "tokens"):
                raise ValueError(f"TokenTerm.{name} must look like 'student/main'"
                                 f"{' or signals/token, or be tokens' if name == 'target' else ''}, got {value!r}")

    @property
    def view(self) -> str:
        return self.student.split("/")[1]

    @property
    def reference(self) -> str:
        """The provider beside the student that it reads; "" where there is none."""
        return "" if self.target == "tokens" or self.target.startswith("signals/") else self.target

    @property
    def states(self) -> dict[str, tuple[Layer, ...]]:
        """{"<provider>/<view>": layers it reads of them}."""
        return dict.fromkeys((self.student, *([self.reference] if self.reference else [])), ("final",))


def token_total(terms: Mapping[str, TokenTerm], sources: Mapping[str, tuple[Array, Head]], batch: Batch,
                weights: Mapping[str, Array], masks: Mapping[str, Array], dynamic: Mapping[str, Mapping[str, Array]], *,
                trainable: tuple[str, ...] | None = None, mesh: Mesh | None = None, chunk: int,
                ) -> tuple[Array, dict[str, RoleSums]]:
    """(sum over terms and tokens of weight * value, {term: RoleSums}) of these rows.

    weights, masks  {term: f32 [B,T]}, as `Objective.weights` makes them of the global batch
    dynamic         {term: values of its scheduled and controlled kwargs}
    trainable       as in `lift_sum`; a target never gets a gradient
    """
    lifted: dict[str, tuple[Array, Array]] = {}
    for source in sorted({s for term in terms.values() for s in term.states}):
        readers = [n for n, term in terms.items() if source in term.states]
        view = terms[readers[0]].view
        hidden, head = sources[source]
        if not (trainable is None or source in trainable) or all(terms[n].student != source for n in readers):
            hidden, head = jax.lax.stop_gradient((hidden, head))
        asked = sum((masks[n] != 0 for n in readers[1:]), start=masks[readers[0]] != 0)
        lifted[source] = lift_tokens(hidden, head, jnp.asarray(batch.views[view].tokens), mask=asked, mesh=mesh,
                                     chunk=chunk)
    totals, metrics = [], {}
    for name, term in terms.items():
        stream, weight = batch.views[term.view], jax.lax.stop_gradient(weights[name])
        given = Tokens(logprobs=lifted[term.student][0], entropies=lifted[term.student][1], mask=masks[name] != 0,
                       segment_ids=jnp.asarray(stream.segment_ids), fields=stream.fields,
                       reference=_reference(name, term, lifted, batch))
        kwargs = {k: v for k, v in term.kwargs.items() if k not in dynamic.get(name, {})} | dict(dynamic.get(name, {}))
        values = term.loss(given, **kwargs)
        totals.append(jnp.sum(weight.astype(values.dtype) * values))
        metrics[name] = by_role(jax.lax.stop_gradient(values), masks[name], stream.roles)
    return sum(totals[1:], start=totals[0]), metrics


def _reference(name: str, term: TokenTerm, lifted: Mapping[str, tuple[Array, Array]], batch: Batch) -> Array | None:
    if term.reference:
        return jax.lax.stop_gradient(lifted[term.reference][0])
    if term.target == "tokens":
        return None
    signal = batch.signals[term.target.removeprefix("signals/")]
    if not isinstance(signal, TokenLogprob):
        raise ValueError(f"term {name!r} needs log-probabilities of the tokens that stand there, and {term.target!r} "
                         f"is a {type(signal).__name__}; score the store with --signal token")
    return jnp.asarray(signal.logprobs)


def policy_metrics(*, old: str = BEHAVIOUR, low: float = 0.2, high: float = 0.2, level: Level = "token",
                   student: str = "student/main", on: tuple[Role, ...] = SUPERVISED) -> dict[str, TokenTerm]:
    """Terms of weight 0 to put beside a policy loss with the same settings: what there is to watch.

    "clip_fraction", "ratio", "entropy" and, between the trainer's log-probs now and the sampler's, "logprob_gap": means
    over tokens of the global batch, and by role.
    """
    settings = {"old": old, "level": level}
    of = lambda loss, kwargs: TokenTerm(loss, student=student, on=on, weight=0.0, kwargs=kwargs)
    return {"clip_fraction": of(clip_fraction, {"low": low, "high": high} | settings),
            "ratio": of(mean_ratio, settings), "entropy": of(entropy, {}), "logprob_gap": of(logprob_gap, {})}
