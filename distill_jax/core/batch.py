"""What a training step receives. The docstrings here are the glossary of per-token fields.

Shapes: B rows, T tokens a row, K kept teacher outcomes. Arrays may be NumPy (from the loader) or jax.

Alignment: every per-token field at index t describes token t given the earlier tokens of its segment.
Nothing here is shifted; only `objective.lift` pairs the hidden state of t-1 with the fields of t.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax

Array = Any  # numpy.ndarray or jax.Array

FOREIGN = 1 << 20
"""Outcomes of a teacher with another vocabulary that the student has no id for are numbered from here: FOREIGN + the
teacher's id. No head reaches so far, so a loss that compares ids counts them into the tail without being told."""


def _pytree(cls: Any) -> Any:
    """Register a dataclass as a pytree whose children are all its fields."""
    names = [f.name for f in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@_pytree
@dataclass(frozen=True, kw_only=True)
class Stream:
    """One tokenised view of the rows.

    tokens       int32 [B,T]   token ids of the model that reads this view; 0 in padding
    positions    int32 [B,T]   position within the segment, from 0
    segment_ids  int32 [B,T]   packed document number from 1; 0 is padding. Segments never see each other
    roles        int32 [B,T]   `core.roles.Role` of the token; PAD in padding
    step_ids     int32 [B,T]   reasoning step within the trace, from 1; 0 = none
    weights      float32 [B,T] loss weight of the token (before roles and schedules); 0 at the first token of a
                               segment (nothing predicts it) and in padding
    row_ids      int32 [B,T]   row of the store the token came from; -1 in padding
    fields       further per-token arrays [B,T] by name, float32 unless said otherwise. Token losses read:
      behaviour_logprobs  what the sampler said of the token it drew
      old_logprobs        what the trainer said of it before the first of several updates on the same rollouts
      advantages          constant over a sample unless a method says otherwise
      returns, old_values what a critic is to say of the state before the token, and what it said at the round
      policy_mask         0 where policy losses are 0 but the token still counts; absent: nowhere
      chosen              1 in chosen (or desirable) sequences, 0 in rejected ones
      rejected            1 in rejected (or undesirable) sequences, 0 elsewhere
      pair_ids            int32, number of the preference pair within its row from 1, 0 = none
      apart               1 in both sequences of a pair from where what was written first differs
      mismatched          1 in answers that stand behind another question (KTO's z0), which have no pair
      trace_ids, group_ids  int32 numbers of the global batch from 1, 0 = none: whose chunk, which question
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    roles: Array
    step_ids: Array
    weights: Array
    row_ids: Array
    fields: dict[str, Array] = field(default_factory=dict)


@_pytree
@dataclass(frozen=True, kw_only=True)
class TopK:
    """The teacher's k most probable outcomes at each token, and what is left as one tail bucket.

    ids       int32 [B,T,K]    token ids, -1 where fewer than K are kept; from FOREIGN on: the student has none
    logprobs  float32 [B,T,K]  full-vocabulary log-probabilities (never renormalised); -inf where ids is -1
    mask      bool [B,T]       whether the teacher said anything about this token
    The tail mass is 1 - sum(exp(logprobs)).
    """

    ids: Array
    logprobs: Array
    mask: Array


@_pytree
@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The teacher's log-probability of the token that stands there. logprobs float32 [B,T], mask bool [B,T]."""

    logprobs: Array
    mask: Array


@_pytree
@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Outcomes drawn from the teacher at each token (random sampling KD): an unbiased stand-in for its distribution.

    ids      int32 [B,T,S]    token ids, each at most once, -1 where fewer than S are kept
    weights  float32 [B,T,S]  their shares (draws of this id x importance), summing to 1; 0 where ids is -1
    mask     bool [B,T]       whether the teacher said anything about this token
    """

    ids: Array
    weights: Array
    mask: Array


@_pytree
@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """The teacher's final-norm state that predicts each token; its head, stored once, makes exact logits of it.

    states  bfloat16 or int8 [B,T,D]
    scales  float32 [B,T]  what the states are multiplied by: 1 for bfloat16, 0 where masked
    mask    bool [B,T]     whether the teacher said anything about this token
    """

    states: Array
    scales: Array
    mask: Array


Signal = TopK | TokenLogprob | Sampled | HiddenStates


@_pytree
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Everything one step needs.

    views    token streams by name; most methods use the one view `main`
    signals  teacher signals by name, aligned with view `main`
    links    arrays that tie views together (pairs, alignments), by name
    """

    views: dict[str, Stream]
    signals: dict[str, Signal] = field(default_factory=dict)
    links: dict[str, Array] = field(default_factory=dict)

    @property
    def main(self) -> Stream:
        return self.views["main"]
