"""What the values of a loss are averaged over: token weights made from the whole global batch.

An aggregation is `fn(mask f32 [B,T], stream) -> (shares f32 [B,T], count)`; the loss is sum(shares * value) / count,
so a token's coefficient is known before the first micro-batch, and no mean is ever taken of a part of the batch.
`mask` holds the token weights of the term. Shapes: B rows, T tokens of the global batch.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.batch import Stream

Array = Any


def token_mean(mask: Array, stream: Stream) -> tuple[Array, Array]:
    """Mean over all tokens of the global batch (DAPO, 2503.14476, eq. 8, over the batch instead of a group)."""
    return mask, jnp.sum(mask)


def sequence_mean(mask: Array, stream: Stream) -> tuple[Array, Array]:
    """Mean over segments of the mean over a segment's tokens (GRPO, 2402.03300, eq. 3; GSPO).

    Segments with any weight are counted, not summed: the same to the bit however the rows are spread over devices.
    """
    ids = jnp.asarray(stream.segment_ids).astype(jnp.int32)
    sums = jax.vmap(lambda m, s: jax.ops.segment_sum(m, s, num_segments=m.shape[0] + 1))(mask, ids)
    return _shares(mask, jnp.take_along_axis(sums, ids, axis=1)), jnp.sum(sums > 0).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class ConstantLength:
    """Mean over segments of (sum over a segment's tokens) / length: every token weighs the same whatever it stands in.

    Dr.GRPO (2503.20783) with the longest generation as `length`; length=1 is the mean of sums over sequences.
    """

    length: int = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"ConstantLength.length is a number of tokens, at least 1, got {self.length}")

    def __call__(self, mask: Array, stream: Stream) -> tuple[Array, Array]:
        return mask / self.length, sequence_mean(mask, stream)[1]


@dataclass(frozen=True, kw_only=True)
class MeanOver:
    """Mean over groups of tokens of the mean over a group's tokens; `field` numbers the groups.

    `MeanOver(field="trace_ids")`: a trace that was written in several chunks counts as one, each chunk by its length
    (Delethink, 2510.06557). `MeanOver(field="group_ids")`: token-mean within a question, mean over questions (DAPO,
    eq. 8 as written). The field holds int32 [B,T] numbers of the global batch in [1, B*T], 0 where there is none.
    """

    field: str

    def __call__(self, mask: Array, stream: Stream) -> tuple[Array, Array]:
        if self.field not in stream.fields:
            raise ValueError(f"MeanOver needs the field {self.field!r}; the batch has {sorted(stream.fields)}")
        ids = jnp.asarray(stream.fields[self.field]).astype(jnp.int32)
        mask = jnp.where(ids > 0, mask, 0.0)
        sums = jax.ops.segment_sum(mask.reshape(-1), ids.reshape(-1), num_segments=ids.size + 1)
        return _shares(mask, sums[ids]), jnp.sum(sums > 0).astype(jnp.float32)


def _shares(mask: Array, own: Array) -> Array:
    return jnp.where(mask > 0, mask / jnp.where(mask > 0, own, 1.0), 0.0)
