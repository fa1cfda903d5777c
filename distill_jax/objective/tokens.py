"""Terms on the log-probabilities of the tokens that stand there: policy gradients, KL, entropy, preferences.

A `TokenTerm` names a token loss (`losses.tokens`), whose log-probs it trains, and those of which model it may compare
them with; everything else as a `Term` does. A term's share of the total is sum_t weight_t value_t with weights made
from the whole global batch, and a value depends on tokens of its own row at most, so the gradient does not depend on
micro-batches, packing (as long as a pair is in one row) or devices.

Two ways to the gradient. Where every loss on a source's log-probs is `local`, the losses are row losses for
`lift.lift_sum`: the gradient is made beside the values. Otherwise log-probs and entropies are lifted once for all terms
of the source (`lift.lift_tokens`), the losses run on [B,T], and the backward computes the logits again, which costs
a fourth product of the head's size. References are values only.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.core.batch import Batch, Stream, TokenLogprob
from distill_jax.core.head import Head
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.core.schedules import Schedule
from distill_jax.losses.rows.logprob import entropy, log_prob
from distill_jax.losses.targets import Known, Labels, Target
from distill_jax.losses.tokens import measures
from distill_jax.losses.tokens.inputs import Tokens, is_local
from distill_jax.losses.tokens.ratios import BEHAVIOUR, Level
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.controllers import Controller
from distill_jax.objective.coupled import Layer
from distill_jax.objective.lift import lift_sum, lift_tokens
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
    stop = jax.lax.stop_gradient

    def lifted(source: str, readers: list[str], moving: bool) -> tuple[Array, Array]:
        """Log-probs and entropies at the tokens of any of the terms `readers`."""
        hidden, head = sources[source] if moving else stop(sources[source])
        asked = jnp.any(jnp.stack([masks[n] != 0 for n in readers]), axis=0)
        return lift_tokens(hidden, head, batch.views[source.split("/")[1]].tokens, mask=asked, mesh=mesh, chunk=chunk)

    references = {source: stop(lifted(source, readers, False)[0])
                  for source, readers in _readers(terms, lambda t: t.reference).items()}
    totals, metrics = [], {}
    for source, readers in _readers(terms, lambda t: t.student).items():
        stream = batch.views[source.split("/")[1]]
        about = {n: Tokens(logprobs=None, entropies=None, mask=masks[n] != 0, segment_ids=None, fields=stream.fields,
                           reference=_reference(n, terms[n], references, batch)) for n in readers}
        moving = {n: dynamic.get(n, {}) for n in readers}
        fixed = {n: {k: v for k, v in terms[n].kwargs.items() if k not in moving[n]} for n in readers}
        if all(is_local(terms[n].loss, terms[n].kwargs) for n in readers):
            rows = {n: RowTerm(loss=_OnLogits(terms[n].loss), source=source, target=f"signals/{n}", kwargs=fixed[n],
                               dynamic=moving[n]) for n in readers}
            total, measured = lift_sum({source: sources[source]}, rows, weights, tokens=stream.tokens, signals=about,
                                       roles=stream.roles, masks=masks, trainable=trainable, mesh=mesh, chunk=chunk)
            totals.append(total)
            metrics |= measured
            continue
        logprobs, entropies = lifted(source, readers, trainable is None or source in trainable)
        for n in readers:
            tokens = replace(about[n], logprobs=logprobs, entropies=entropies, segment_ids=stream.segment_ids)
            values = terms[n].loss(tokens, **fixed[n], **moving[n])
            totals.append(jnp.sum(stop(weights[n]).astype(values.dtype) * values))
            metrics[n] = by_role(stop(values), masks[n], stream.roles)
    return sum(totals[1:], start=totals[0]), metrics


def _readers(terms: Mapping[str, TokenTerm], of: Callable[[TokenTerm], str]) -> dict[str, list[str]]:
    """{source: names of the terms that read it}."""
    out: dict[str, list[str]] = {}
    for name, term in terms.items():
        if source := of(term):
            out.setdefault(source, []).append(name)
    return out


@dataclass(frozen=True)
class _OnLogits:
    """A local token loss as a row loss on logits [N,V]."""

    loss: Callable[..., Array]

    def __call__(self, logits: Array, target: Target, **kwargs: Any) -> Array:
        assert isinstance(target, Known)
        tokens = replace(target.about, logprobs=log_prob(logits, Labels(target.ids)), entropies=entropy(logits))
        return self.loss(tokens, **kwargs)


def _reference(name: str, term: TokenTerm, lifted: Mapping[str, Array], batch: Batch) -> Array | None:
    if term.reference:
        return lifted[term.reference]
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

    "clip_fraction", "mean_ratio", "mean_entropy" and, between the trainer's log-probs now and the sampler's,
    "logprob_gap": means over tokens of the global batch, and by role.
    """
    settings = {"old": old, "level": level}
    of = lambda loss, kwargs: TokenTerm(loss, student=student, on=on, weight=0.0, kwargs=kwargs)
    return {"clip_fraction": of(measures.clip_fraction, {"low": low, "high": high} | settings),
            "mean_ratio": of(measures.mean_ratio, settings), "mean_entropy": of(measures.entropy, {}),
            "logprob_gap": of(measures.logprob_gap, {})}
