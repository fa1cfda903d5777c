"""What a row loss is measured against. Shapes: N rows (tokens), V vocabulary, K kept outcomes.

Targets are constants: row losses put `stop_gradient` on whatever they read from one.
"""

from dataclasses import dataclass
from typing import Any

import jax

Array = Any


def _pytree(*fields: str) -> Any:
    return lambda cls: jax.tree_util.register_dataclass(cls, data_fields=list(fields), meta_fields=[])


@_pytree("ids")
@dataclass(frozen=True)
class Labels:
    """The token that stands there. ids int32 [N]."""

    ids: Array


@_pytree("logits")
@dataclass(frozen=True)
class Full:
    """A whole teacher distribution. logits float32 [N,V]; V may differ from the student's (padded heads)."""

    logits: Array


@_pytree("ids", "logprobs")
@dataclass(frozen=True)
class TopKTarget:
    """The teacher's K most probable outcomes; everything else is one tail bucket.

    ids       int32 [N,K]    unique within a row; -1 where fewer than K are kept
    logprobs  float32 [N,K]  full-vocabulary log-probabilities at temperature 1, not renormalised; -inf where -1
    """

    ids: Array
    logprobs: Array


Target = Labels | Full | TopKTarget
