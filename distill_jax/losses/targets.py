"""What a row loss is measured against. Shapes: N rows (tokens), V vocabulary, K kept outcomes.

Targets are constants: row losses put `stop_gradient` on whatever they read from one.
"""

from dataclasses import dataclass
from typing import Any

import jax

Array = Any


def _pytree(*fields: str, meta: tuple[str, ...] = ()) -> Any:
    return lambda cls: jax.tree_util.register_dataclass(cls, data_fields=list(fields), meta_fields=list(meta))


@_pytree("ids")
@dataclass(frozen=True)
class Labels:
    """The token that stands there. ids int32 [N]."""

    ids: Array


@_pytree("logits", "token")
@dataclass(frozen=True)
class Full:
    """A whole teacher distribution.

    logits  float32 [N,V]  V may differ from the student's (padded heads)
    token   int32 [N]      the token that stands there, for losses that want both (PLD); None = not known
    """

    logits: Array
    token: Array | None = None


@_pytree("ids", "logprobs", "token", meta=("grad_dtype",))
@dataclass(frozen=True)
class TopKTarget:
    """The teacher's K most probable outcomes (K = 1: any one of them); everything else is one tail bucket.

    ids       int32 [N,K]    unique within a row; -1 where fewer than K are kept
    logprobs  float32 [N,K]  full-vocabulary log-probabilities at temperature 1, not renormalised; -inf where -1
    token     int32 [N]      as in `Full`
    grad_dtype  dtype that the gradient of the logits will be rounded to anyway (the lift's compute dtype), None =
              theirs. Rounding before the scatter of the kept ids saves a pass over [N,V] in float32
    """

    ids: Array
    logprobs: Array
    grad_dtype: Any = None
    token: Array | None = None


@_pytree("ids", "weights", meta=("grad_dtype",))
@dataclass(frozen=True)
class SampledTarget:
    """Outcomes drawn from the teacher: sum(weights * f(ids)) estimates the teacher's mean of f without bias.

    Only what is linear in the teacher's probabilities can be had from it: cross-entropy against the teacher, and so
    the gradient of forward KL (Random Sampling KD).

    ids      int32 [N,S]    unique within a row; -1 where fewer than S are kept
    weights  float32 [N,S]  summing to 1; 0 where -1
    grad_dtype  as in `TopKTarget`
    """

    ids: Array
    weights: Array
    grad_dtype: Any = None


@_pytree("ids", "about")
@dataclass(frozen=True)
class Known:
    """The token that stands there and what is known about it, for token losses that are computed on the logits.

    ids int32 [N]; about: a `losses.tokens.inputs.Tokens` of [N] without log-probs and entropies
    """

    ids: Array
    about: Any


Target = Labels | Full | TopKTarget | SampledTarget | Known
