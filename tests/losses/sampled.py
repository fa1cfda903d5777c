"""Token losses by hand: sequences written as lists, laid out in rows."""

import jax.numpy as jnp
import numpy as np

from distill_jax.core.batch import Stream
from distill_jax.losses.tokens.inputs import Tokens


def lay_out(rows, width=None):
    """[[segment, ...], ...] of lists of numbers -> (values f32 [B,T], segment_ids i32 [B,T])."""
    width = width or max(sum(map(len, row)) for row in rows)
    values, ids = np.zeros((len(rows), width), np.float32), np.zeros((len(rows), width), np.int32)
    for r, row in enumerate(rows):
        at = 0
        for s, segment in enumerate(row):
            values[r, at:at + len(segment)], ids[r, at:at + len(segment)] = segment, s + 1
            at += len(segment)
    return values, ids


def tokens_of(logprobs, *, entropies=None, reference=None, mask=None, **fields):
    """`Tokens` from rows of segments; every field is laid out in the same way, or a number for all tokens."""
    values, ids = lay_out(logprobs)
    array = lambda x: np.full(values.shape, x, np.float32) if np.isscalar(x) else lay_out(x, values.shape[1])[0]
    return Tokens(
        logprobs=jnp.asarray(values), segment_ids=jnp.asarray(ids),
        entropies=jnp.asarray(array(0.0 if entropies is None else entropies)),
        mask=jnp.asarray((ids > 0) & (True if mask is None else array(mask) != 0)),
        reference=None if reference is None else jnp.asarray(array(reference)),
        fields={k: jnp.asarray(array(v)) for k, v in fields.items()})


def stream_of(tokens):
    """The stream that an aggregation looks at."""
    ids = np.asarray(tokens.segment_ids)
    return Stream(tokens=ids, positions=ids, segment_ids=ids, roles=ids, step_ids=ids, weights=ids.astype(np.float32),
                  row_ids=ids, fields=dict(tokens.fields))


def aggregated(values, tokens, per):
    shares, count = per(jnp.asarray(tokens.mask, jnp.float32), stream_of(tokens))
    return jnp.sum(shares * values) / count
