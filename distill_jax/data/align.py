"""Attach what a teacher said about one rendering of a trace to another rendering of it.

A teacher scores a trace under its own chat template; the student's row holds the same segments between other template
tokens. A token of one row is the same event as a token of the other when it covers the same bytes of the same segment
and is the same token. Template tokens that a model writes itself (think tags, the end of the turn) match when they
are the same token at the same place behind the same segment token.

Two tokenizers fit here when their learned vocabularies are equal. Added tokens may differ (R1-Distill-Qwen ends a turn
with another token than Qwen2.5): they are matched by content, the end of the turn by its meaning, and outcomes
without a counterpart fall into the tail. Other pairs: `data.cross`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distill_jax.core.batch import FOREIGN
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.tokenizer import same_real_ids
from distill_jax.traces.store.signals import SampledRow, SignalRow, TokenRow, TopKRow

MIN_COVERAGE = 0.9
_PRIMES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)


class TokenArrays(Protocol):
    """Per-token arrays of a row: tokens [T], roles [T], parts [T], spans [T,2]."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def roles(self) -> np.ndarray: ...
    @property
    def parts(self) -> np.ndarray: ...
    @property
    def spans(self) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """index int32 [T]: the source token whose distribution is meant at target token t, -1 if none. supervised, covered:
    tokens of the target's segments a loss is taken on, and those of them that have their text in the source. Think tags
    and turn ends are not counted: they differ between templates by their nature.

    With one vocabulary a source token with a target is the same token. With two (`data.cross`), pairs int32 [T] is
    `index` where it is, and begun counts the covered tokens that have a distribution.
    """

    index: np.ndarray
    supervised: int
    covered: int
    pairs: np.ndarray | None = None
    begun: int | None = None


def token_map(source: Mapping[str, Any], target: Mapping[str, Any]) -> np.ndarray | None:
    """int32 [real ids of source]: the target's id of each source id, -1 where it has none; None when all are equal.

    Takes `Tokenizer.info()` of both. Raises ValueError when the learned vocabularies differ.
    """
    if source["hash"] == target["hash"]:
        return None
    if source["base_hash"] != target["base_hash"]:
        found = "; ".join(same_real_ids(source, target)[:4])
        raise ValueError(
            f"the teacher's tokens ({source['name']}) cannot be attached to the student's ({target['name']}): "
            f"{found}. Write a store with the student's tokenizer and score that (`distill-jax score` takes a teacher "
            "of any vocabulary), or train on the text alone (cross-entropy).")
    out = np.arange(source["real"], dtype=np.int32)
    for content, token in source["added"].items():
        out[token] = target["added"].get(content, -1)
    if source["eos"] and target["eos"]:
        out[out == target["eos"][0]] = -1  # one source id for each target id
        out[source["eos"][0]] = target["eos"][0]
    return out


def align(source: TokenArrays, target: TokenArrays, mapping: np.ndarray | None = None) -> Alignment:
    """Where each token of `target` stands in `source`. `mapping` comes from `token_map`."""
    tokens = source.tokens if mapping is None else mapping[source.tokens]
    have, want = _keys(source, tokens), _keys(target, target.tokens)
    order = np.argsort(_mix(have), kind="stable")
    mixed = _mix(have)[order]
    at = np.minimum(np.searchsorted(mixed, _mix(want)), len(order) - 1)
    index = order[at]
    same = (have[index] == want).all(axis=1) & (want[:, 3] >= 0)
    supervised = np.isin(target.roles, [int(r) for r in SUPERVISED]) & (target.parts >= 0)
    return Alignment(index=np.where(same, index, -1).astype(np.int32), supervised=int(supervised.sum()),
                     covered=int((supervised & same).sum()))


def _keys(row: TokenArrays, tokens: np.ndarray) -> np.ndarray:
    """int64 [T,4]: (part, start, end, id) of segment tokens; template tokens the model writes stand as
    (-2 - part, end, distance, id) of the segment token before them; others match nothing."""
    written = np.isin(row.roles, [int(r) for r in SUPERVISED])
    content = row.parts >= 0
    out = np.concatenate([row.parts[:, None], row.spans, tokens[:, None]], axis=1).astype(np.int64)
    where = np.arange(len(tokens))
    glue = ~content & written
    anchor = np.maximum.accumulate(np.where(content, where, -1))
    run_start = np.maximum.accumulate(np.where(glue, -1, where))  # last token that is not glue
    has = anchor >= 0
    out[glue, 0] = np.where(has, -2 - row.parts[anchor].astype(np.int64), -(1 << 20))[glue]
    out[glue, 1] = np.where(has, row.spans[anchor, 1], 0)[glue]
    out[glue, 2] = (where - run_start)[glue]
    out[~content & ~written, 3] = -1
    return out


def _mix(keys: np.ndarray) -> np.ndarray:
    """One uint64 a key. Keys are compared in full afterwards: a collision costs a match, never makes a wrong one."""
    out = np.zeros(len(keys), np.uint64)
    for column, prime in zip(keys.T, _PRIMES):
        out = (out ^ column.astype(np.uint64)) * np.uint64(prime)
        out ^= out >> np.uint64(29)
    return out


def gather(row: SignalRow, index: np.ndarray, mapping: np.ndarray | None = None) -> Any:
    """A signal of the source row at the target's tokens (`Alignment.index`).

    Outcomes the target has no id for are taken out: their mass is the tail's (top-k), or that of the other draws
    (sampled; a token with no other draw has no signal). Raises ValueError for hidden states of another vocabulary:
    the stored head has the ids of its teacher.
    """
    out = row.at(index)
    if mapping is None or isinstance(out, TokenRow):
        return out
    if not isinstance(out, TopKRow | SampledRow):
        raise ValueError("hidden states cannot be attached to tokens with other ids than the teacher's: their head has "
                         "the teacher's ids. Score topk or sampled instead")
    known = (out.ids >= 0) & (out.ids < FOREIGN)  # what one student lacks another one lacks too, for all that is known
    ids = np.where(known, mapping[np.where(known, out.ids, 0)], out.ids).astype(np.int32)
    lost = (out.ids >= 0) & (ids < 0)
    if isinstance(out, TopKRow):
        logprobs = np.where(lost, np.float32(-np.inf), out.logprobs)
        moved = np.exp(out.logprobs).sum(axis=1, where=lost, initial=0)
        tail = None if out.tail is None else np.clip(out.tail + moved, 0, 1).astype(np.float32)
        return TopKRow(ids=ids, logprobs=logprobs, mask=out.mask, tail=tail)
    lost |= ids >= FOREIGN
    ids = np.where(lost, -1, ids)
    weights = np.where(lost, np.float32(0), out.weights)
    total = weights.sum(axis=1)
    weights = weights / np.where(total > 0, total, 1).astype(np.float32)[:, None]
    return SampledRow(ids=ids, weights=weights, mask=out.mask & (total > 0))


def require_coverage(alignments: Iterable[Alignment], least: float = MIN_COVERAGE) -> float:
    """Covered share of the supervised tokens of these rows. Raises ValueError when it is below `least`."""
    covered = supervised = 0
    for a in alignments:
        covered, supervised = covered + a.covered, supervised + a.supervised
    share = covered / supervised if supervised else 0.0
    if share < least:
        raise ValueError(
            f"the signal covers {share:.1%} of the student's supervised tokens, at least {least:.0%} is asked: the "
            f"two tokenizations of the same text differ too much. Score again with a teacher of the student's "
            f"tokenizer, or train on the text alone (cross-entropy).")
    return share
