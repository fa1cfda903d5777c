"""Terms on the log-probabilities of the tokens that stand there: policy gradients, KL, entropy, preferences.

A `TokenTerm` names a token loss (`losses.tokens`), whose log-probs it trains, and those of which model it may compare
them with; everything else as a `Term` does. A term's share of the total is sum_t weight_t value_t with weights made
from the whole global batch, and a value depends on tokens of its own row at most, so the gradient does not depend on
micro-batches, packing (as long as a pair is in one row) or devices.

Two ways to the gradient. Where every token loss on a source is `local`, they are row losses like others: `lift_sum`
makes gradients beside values, from the logits that row terms on this source share. Otherwise log-probs and entropies
are lifted once for all token terms of the source (`lift_tokens`), the losses run on [B,T], and the backward computes
the logits again: a fourth product of the head's size. References are values only.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.core.batch import Batch, Stream, TokenLogprob
from distill_jax.core.head import Head
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.core.schedules import Schedule
from distill_jax.losses.rows.logprob import entropy, log_prob
from distill_jax.losses.rows.vocabulary import Reads
from distill_jax.losses.targets import Known, Labels, Target
from distill_jax.losses.tokens import measures
from distill_jax.losses.tokens.inputs import Tokens, is_local
from distill_jax.losses.tokens.ratios import BEHAVIOUR, Level
from distill_jax.objective.controllers import Controller
from distill_jax.objective.coupled import Layer
from distill_jax.objective.lift import lift_tokens
from distill_jax.objective.rows import RowTerm

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


def about(term: str) -> str:
    """Name under which what is known of a term's tokens goes to the lift, beside the signals; none can have it."""
    return f"about/{term}"


def known_tokens(terms: Mapping[str, TokenTerm], sources: Mapping[str, tuple[Array, Head]], batch: Batch,
                 masks: Mapping[str, Array], *, mesh: Mesh | None = None, chunk: int) -> dict[str, Tokens]:
    """{term: what its loss is given}, but for log-probs and entropies. References are lifted here, values only."""
    logprobs = {s: lift_source(s, names, sources, batch, masks, trainable=(), mesh=mesh, chunk=chunk)[0]
                for s, names in _by(terms, lambda t: t.reference).items()}
    return {name: replace(about_tokens(batch.views[term.view], masks[name]),
                          reference=_reference(name, term, logprobs, batch)) for name, term in terms.items()}


def about_tokens(stream: Stream, mask: Array) -> Tokens:
    """What a stream says of its tokens, without log-probs and segments."""
    return Tokens(logprobs=None, entropies=None, mask=mask != 0, segment_ids=None, fields=stream.fields)


def local_rows(terms: Mapping[str, TokenTerm]) -> dict[str, RowTerm]:
    """The terms that can be row terms, because all terms on their source are local: {term: RowTerm}, without kwargs."""
    return {name: RowTerm(loss=_OnLogits(terms[name].loss), source=source, target=f"signals/{about(name)}")
            for source, names in _by(terms, lambda t: t.student).items()
            if all(is_local(terms[n].loss, terms[n].kwargs) for n in names) for name in names}


def token_values(terms: Mapping[str, TokenTerm], known: Mapping[str, Tokens],
                 settings: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Array]]],
                 sources: Mapping[str, tuple[Array, Head]], batch: Batch, *, trainable: tuple[str, ...] | None = None,
                 mesh: Mesh | None = None, chunk: int) -> dict[str, Array]:
    """{term: its loss at every token, f32 [B,T]}, differentiable; `settings` {term: (constant, moving) kwargs}."""
    out: dict[str, Array] = {}
    masks = {name: tokens.mask for name, tokens in known.items()}
    for source, names in _by(terms, lambda t: t.student).items():
        logprobs, entropies = lift_source(source, names, sources, batch, masks, trainable=trainable, mesh=mesh,
                                          chunk=chunk)
        for name in names:
            tokens = replace(known[name], logprobs=logprobs, entropies=entropies,
                             segment_ids=batch.views[terms[name].view].segment_ids)
            constant, moving = settings[name]
            out[name] = terms[name].loss(tokens, **constant, **moving)
    return out


def lift_source(source: str, readers: list[str], sources: Mapping[str, tuple[Array, Head]], batch: Batch,
                masks: Mapping[str, Array], *, trainable: tuple[str, ...] | None, mesh: Mesh | None, chunk: int,
                ) -> tuple[Array, Array]:
    """(log-probs, entropies) [B,T] of a source at the tokens of any of the terms `readers`."""
    hidden, head = sources[source]
    if not (trainable is None or source in trainable):
        hidden, head = jax.lax.stop_gradient((hidden, head))
    asked = jnp.any(jnp.stack([jnp.asarray(masks[name], bool) for name in readers]), axis=0)
    return lift_tokens(hidden, head, batch.views[source.split("/")[1]].tokens, mask=asked, mesh=mesh, chunk=chunk)


def _by(terms: Mapping[str, TokenTerm], of: Callable[[TokenTerm], str]) -> dict[str, list[str]]:
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
    reads: ClassVar[Reads] = Reads((Known,), whole=True)

    def __call__(self, logits: Array, target: Target, **kwargs: Any) -> Array:
        assert isinstance(target, Known)
        tokens = replace(target.about, logprobs=log_prob(logits, Labels(target.ids)), entropies=entropy(logits))
        return self.loss(tokens, **kwargs)


def _reference(name: str, term: TokenTerm, logprobs: Mapping[str, Array], batch: Batch) -> Array | None:
    if term.reference:
        return logprobs[term.reference]
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


def preference_metrics(*, target: str = "tokens", beta: float = 1.0, average: bool = False, pairs: bool = True,
                       where: str = "pair_ids", student: str = "student/main", on: tuple[Role, ...] = SUPERVISED
                       ) -> dict[str, TokenTerm]:
    """Terms of weight 0 to put beside a preference loss with the same target, beta and `where`.

    "preference_accuracy", share of pairs whose chosen side has the larger implicit reward, and "reward_margin", chosen
    minus rejected: of beta times the log ratio to the reference (`average`: per token), or without one of beta times
    the mean log-prob. pairs=False (KTO): "chosen_reward" and "rejected_reward", means over sequences. Either way
    "chosen_logprob" and "rejected_logprob": means over sequences of the mean over tokens.
    """
    def of(loss: Callable[..., Array], where: str, kwargs: Mapping[str, Any], target: str = target) -> TokenTerm:
        return TokenTerm(loss, student=student, target=target, on=on, where=where, weight=0.0, per="sequence",
                         kwargs=kwargs)

    sides = ("chosen", "rejected")
    out = {"preference_accuracy": of(measures.preference_accuracy, where, {"average": average}),
           "reward_margin": of(measures.preference_margin, where, {"beta": beta, "average": average})} if pairs else {
        f"{side}_reward": of(measures.sequence_log_ratio, side, {"beta": beta}) for side in sides}
    return out | {f"{side}_logprob": of(measures.logprob, side, {}, "tokens") for side in sides}
