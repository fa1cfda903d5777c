"""Entropic optimal transport in the log domain, and Sinkhorn KD between the distributions of a batch.

Shapes: n, m points of the two sides; B rows, T tokens, V vocabulary, M compared outcomes, K kept outcomes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.batch import TopK
from distill_jax.core.head import NEG, wide
from distill_jax.losses.groups.states import States, declare
from distill_jax.losses.rows.outcomes import ABSENT, kept_and_tail
from distill_jax.losses.rows.tempering import untempered

Array = Any


def log_plan(cost: Array, log_rows: Array, log_columns: Array, *, eps: float, iterations: int,
             allowed: Array | None = None) -> Array:
    """log of the transport plan [n,m] that minimises <P, cost> - eps H(P) with the given marginals.

    cost [n,m], log_rows [n], log_columns [m]: log-masses; `allowed` bool [n,m]: pairs that may carry mass (None: all);
    where it is False the result is NEG. Sinkhorn's iterations (Cuturi 2013) on the potentials: rows, then columns,
    so the columns' sums are exact and the rows' as good as `iterations` make them.
    """
    kernel = -cost / eps
    put = lambda x: x if allowed is None else jnp.where(allowed, x, NEG)

    def turn(_: Any, potentials: tuple[Array, Array]) -> tuple[Array, Array]:
        _, g = potentials
        f = log_rows - jax.nn.logsumexp(put(kernel + g[None, :]), axis=1)
        return f, log_columns - jax.nn.logsumexp(put(kernel + f[:, None]), axis=0)

    f, g = jax.lax.fori_loop(0, iterations, turn, (jnp.zeros_like(log_rows), jnp.zeros_like(log_columns)))
    return put(kernel + f[:, None] + g[None, :])


def sinkhorn_distance(p: Array, q: Array, *, eps: float = 0.1, iterations: int = 20,
                      present: Array | None = None) -> Array:
    """sum_ij P_ij W_ij / n of two sets of n distributions p, q [n,M] -> scalar; W_ij = ||p_i - q_j||_1.

    Cui et al. 2024 (SinKD; code 2018cx/SinKD, loss.py): P from K = exp(-W / eps) with rows, then columns, scaled to
    sum to one, `iterations` times. Their loss is the sum; its total mass is n, so it is divided by n here. `present`
    bool [n] leaves points out on both sides. Gradients flow through W and P to p only. Permuting p or q changes
    nothing, so a term that pairs the tokens must stand beside it.
    """
    there: Any = jnp.ones(p.shape[0], bool) if present is None else present
    cost = l1_distances(p, jax.lax.stop_gradient(q))
    allowed = there[:, None] & there[None, :]
    log_one = jnp.zeros(p.shape[0], cost.dtype)
    log_p = log_plan(cost, log_one, log_one, eps=eps, iterations=iterations, allowed=allowed)
    moved = jnp.sum(jnp.where(allowed, jnp.exp(log_p) * cost, 0.0))
    return moved / jnp.maximum(jnp.sum(there.astype(cost.dtype)), 1.0)


def l1_distances(p: Array, q: Array) -> Array:
    """||p_i - q_j||_1 of p [n,M], q [m,M] -> [n,m], one row at a time: [n,m,M] never exists, nor in the backward."""
    return jax.lax.map(jax.checkpoint(lambda row: jnp.sum(jnp.abs(row[None, :] - q), axis=-1)), p)


@declare(head=True)
def sinkhorn_kd(student: States, teacher: States, *, temperature: float = 2.0, eps: float = 0.1, iterations: int = 20,
                tokens: int = 256, axes: tuple[str, ...] = ()) -> Array:
    """Sinkhorn distance between student's and teacher's distributions of at most `tokens` masked tokens -> [B,T].

    `sinkhorn_distance` of the softmax of logits / temperature, the same value at every masked token. The tokens are
    spread evenly over the masked ones, so [tokens, V] logits exist and never [B,T,V]. A stored `TopK` signal is
    compared on the union of all kept ids and one tail bucket: what the teacher did not keep of a token is in that
    token's tail. The tail cannot be tempered, so a signal needs temperature=1.

    The group is the rows of one device in a micro-batch (axes=(), `scope="device"`), or of all devices
    (`scope="global"`: `tokens` in all, gathered over the data axes). The value depends on how the batch is cut into
    groups, as the published loss depends on the batch size.
    """
    if student.x is None or student.head is None:
        raise ValueError("sinkhorn_kd needs the student's hidden states and head")
    shards = jax.lax.axis_size(axes) if axes else 1
    at, present = _spread(student.mask.reshape(-1), max(1, tokens // shards))
    pick = lambda x: jnp.take(x.reshape(-1, *x.shape[2:]), at, axis=0)
    gather = lambda x: jax.lax.all_gather(x, axes, tiled=True) if axes else x
    logits = student.head.logits(pick(student.x))
    if teacher.signal is None:
        assert teacher.x is not None and teacher.head is not None
        q, p = _tempered(logits, teacher.head.logits(pick(teacher.x)), temperature)
    else:
        q, p = _on_union(logits, jax.tree.map(pick, teacher.signal), temperature, gather)
    value = sinkhorn_distance(gather(q), gather(p), eps=eps, iterations=iterations, present=gather(present))
    return jnp.where(student.mask, value, 0.0)


def _spread(mask: Array, n: int) -> tuple[Array, Array]:
    """(indices [n'] of n' = min(n, N) masked entries, spread evenly; bool [n'] which of them exist). mask bool [N]."""
    n = min(n, mask.shape[0])
    count = jnp.sum(mask, dtype=jnp.int32)
    order = jnp.nonzero(mask, size=mask.shape[0], fill_value=0)[0].astype(jnp.int32)
    i = jnp.arange(n, dtype=jnp.int32)
    spread = (i.astype(jnp.float32) * (count.astype(jnp.float32) / n)).astype(jnp.int32)
    return order[jnp.where(count > n, jnp.minimum(spread, count - 1), i)], i < count


def _tempered(logits: Array, teacher: Array, temperature: float) -> tuple[Array, Array]:
    """(student's, teacher's) probabilities [n,M] over the ids both heads have."""
    vocab = min(logits.shape[-1], teacher.shape[-1])
    z, t = (x[:, :vocab].astype(wide(logits)) for x in (logits, jax.lax.stop_gradient(teacher)))
    real = (z > ABSENT) & (t > ABSENT)
    return tuple(jax.nn.softmax(jnp.where(real, x / temperature, NEG), axis=-1) for x in (z, t))  # type: ignore


def _on_union(logits: Array, signal: Any, temperature: float, gather: Any) -> tuple[Array, Array]:
    """(student's, teacher's) probabilities [n,M+1] over all ids kept for any of the tokens, and the tail."""
    if not isinstance(signal, TopK):
        raise ValueError(f"sinkhorn_kd needs a teacher beside the student or a topk signal, got a "
                         f"{type(signal).__name__} signal, which is no distribution")
    if temperature != 1.0:
        raise untempered(temperature, "or run the teacher beside the student")
    vocab = logits.shape[-1]
    stored = (signal.ids >= 0) & (signal.ids < vocab) & (signal.logprobs > ABSENT)
    ids = jnp.where(stored, signal.ids, vocab)
    every = gather(ids)
    union = jnp.unique(every, size=every.size, fill_value=vocab)
    kept, tail = kept_and_tail(logits, jnp.broadcast_to(union[None], (ids.shape[0], union.size)))  # type: ignore
    row = jnp.arange(ids.shape[0])[:, None]
    mass = jnp.where(stored, jnp.exp(jnp.where(stored, signal.logprobs, 0.0)), 0.0).astype(kept.dtype)
    teacher = jnp.zeros(kept.shape, kept.dtype).at[row, jnp.searchsorted(union, ids)].add(mass)
    rest = jnp.clip(1.0 - jnp.sum(mass, axis=-1), 0.0, 1.0)
    with_tail = lambda x, t: jnp.concatenate([x, t[:, None]], axis=-1)
    return with_tail(jnp.exp(kept), jnp.exp(tail)), with_tail(teacher, rest)
