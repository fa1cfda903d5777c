"""Student and teacher as log-probabilities over the same outcomes: what every divergence is written on.

Shapes: N rows, V vocabulary, K kept outcomes, M compared outcomes. For a `Full` target the outcomes are the ids both
heads have (M = min of the two V). For a `TopKTarget` they are the K kept ids and one tail bucket (M = K + 1):
the teacher's tail is `1 - sum(kept)`, the student's the mass of every id that is not kept, so nothing is renormalised
and a divergence of the M outcomes is a lower bound of the full one (data processing inequality).

An outcome that one side cannot have (padding of K, padded vocabulary, ids the student lacks) is `NEG` on both sides,
and contributes exactly zero to value and gradient. Everything is float32 (float64 where the logits are).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.head import NEG, wide
from distill_jax.losses.targets import Full, Target, TopKTarget

Array = Any

TAIL_FLOOR = 1e-7
"""Smallest tail mass a teacher may have: float32 cannot tell 1 - sum(kept) from 0 below this."""

_ABSENT = NEG / 2  # logits below it belong to ids that do not exist


@jax.custom_vjp
def log_normalizer(logits: Array) -> Array:
    """log sum exp over the last axis. logits [N,V] -> [N].

    The gradient is recomputed from the logits, so no second [N,V] array outlives the forward pass; calls on the same
    logits (several terms) are merged by the compiler.
    """
    top = jnp.max(logits, axis=-1)
    return top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))


def _log_normalizer_fwd(logits: Array) -> tuple[Array, tuple[Array, Array]]:
    out = log_normalizer(logits)
    return out, (logits, out)


def _log_normalizer_bwd(saved: tuple[Array, Array], grad: Array) -> tuple[Array]:
    logits, out = saved
    return (grad[:, None] * jnp.exp(logits - out[:, None]),)


log_normalizer.defvjp(_log_normalizer_fwd, _log_normalizer_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def kept_and_tail(logits: Array, ids: Array, grad_dtype: Any = None) -> tuple[Array, Array]:
    """Student log-probabilities of the kept ids and of all others together.

    logits [N,V], ids int32 [N,K] unique or absent (-1, or not an id of the student) ->
    (kept [N,K], tail [N]), NEG where an id is absent and where no id is left for the tail. `grad_dtype` as in
    `TopKTarget`.

    The tail is a log-sum-exp over the ids that are not kept, not log(1 - sum): that loses every digit once the
    student is confident, and its gradient is then a difference of huge numbers.
    """
    return _kept_and_tail_fwd(logits, ids, grad_dtype)[0]


def _kept_and_tail_fwd(logits: Array, ids: Array, grad_dtype: Any) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    rows, vocab = logits.shape
    inside = (ids >= 0) & (ids < vocab)
    z = jnp.take_along_axis(logits, jnp.where(inside, ids, 0), axis=-1)
    present = inside & (z > _ABSENT)
    slots = jnp.where(present, ids, vocab)  # out of range: dropped by the scatters
    row = jnp.arange(rows)[:, None]
    is_kept = jnp.zeros((rows, vocab), bool).at[row, slots].set(True, mode="drop")
    # `where` outside the exponential: the two reductions then read the logits, not a masked copy of them.
    top = jnp.max(jnp.where(is_kept, NEG, logits), axis=-1)
    has_tail = top > _ABSENT
    rest = jnp.sum(jnp.where(is_kept, 0.0, jnp.exp(logits - jnp.where(has_tail, top, -NEG)[:, None])), axis=-1)
    tail_norm = jnp.where(has_tail, top + jnp.log(jnp.where(has_tail, rest, 1.0)), NEG)
    norm = jnp.logaddexp(tail_norm, log_normalizer(jnp.where(present, z, NEG)))
    kept = jnp.where(present, z - norm[:, None], NEG)
    tail = jnp.where(has_tail, tail_norm - norm, NEG)
    return (kept, tail), (logits, slots, is_kept, norm, tail_norm, kept, tail)


def _kept_and_tail_bwd(grad_dtype: Any, saved: tuple[Array, ...], grads: tuple[Array, Array]) -> tuple[Array, None]:
    logits, slots, is_kept, norm, tail_norm, kept, tail = saved
    g_kept = jnp.where(kept > _ABSENT, grads[0], 0.0)
    g_tail = jnp.where(tail > _ABSENT, grads[1], 0.0)
    total = jnp.sum(g_kept, axis=-1) + g_tail
    tail_norm = jnp.where(tail > _ABSENT, tail_norm, -NEG)  # exp(logits - tail_norm) = 0 without a tail
    others = g_tail[:, None] * jnp.exp(logits - tail_norm[:, None]) - total[:, None] * jnp.exp(logits - norm[:, None])
    # Set, not add: the kept entries of `others` may be huge where the tail is tiny, and would cancel badly.
    row = jnp.arange(logits.shape[0])[:, None]
    exact = g_kept - total[:, None] * jnp.exp(kept)
    dtype = grad_dtype or logits.dtype
    out = jnp.where(is_kept, 0.0, others).astype(dtype).at[row, slots].set(exact.astype(dtype), mode="drop")
    return out.astype(logits.dtype), None


kept_and_tail.defvjp(_kept_and_tail_fwd, _kept_and_tail_bwd)


def outcomes(logits: Array, target: Target, temperature: float = 1.0) -> tuple[Array, Array]:
    """(log q, log p) [N,M] of student and teacher over the same outcomes; no gradient through log p.

    logits [N,V]. `temperature` divides both sides' logits; exact only where every outcome is known, so a
    `TopKTarget` refuses another one than 1. Raises ValueError for that, and for `Labels`.
    """
    if isinstance(target, Full):
        return _full(logits, target, temperature)
    if isinstance(target, TopKTarget):
        if temperature != 1.0:
            raise ValueError(
                f"temperature={temperature} with a top-k target: the tail is a sum over ids and cannot be tempered "
                "exactly. Use temperature=1, or a full target (an online teacher or a `hidden` signal)")
        return _topk(logits, target)
    raise ValueError(f"expected a Full or TopKTarget target, got {type(target).__name__}: this loss compares "
                     "distributions; name a signal or a provider as the term's target, not 'tokens'")


def _full(logits: Array, target: Full, temperature: float) -> tuple[Array, Array]:
    vocab = min(logits.shape[-1], target.logits.shape[-1])
    z = logits[:, :vocab].astype(wide(logits))
    t = jax.lax.stop_gradient(target.logits[:, :vocab].astype(z.dtype))
    real = (z > _ABSENT) & (t > _ABSENT)
    z = jnp.where(real, z / temperature, NEG)
    t = jnp.where(real, t / temperature, NEG)
    return z - log_normalizer(z)[:, None], t - log_normalizer(t)[:, None]


def _topk(logits: Array, target: TopKTarget) -> tuple[Array, Array]:
    logits = logits.astype(wide(logits))
    logprobs = jax.lax.stop_gradient(target.logprobs.astype(logits.dtype))
    stored = (target.ids >= 0) & (logprobs > _ABSENT)
    student: Any = kept_and_tail(logits, jnp.where(stored, target.ids, -1), target.grad_dtype)
    kept, tail = student
    teacher_kept = jnp.where(jax.lax.stop_gradient(kept) > _ABSENT, logprobs, NEG)
    mass = 1.0 - jnp.sum(jnp.exp(teacher_kept), axis=-1)
    teacher_tail = jnp.where(jax.lax.stop_gradient(tail) > _ABSENT, jnp.log(jnp.clip(mass, TAIL_FLOOR, 1.0)), NEG)
    return (jnp.concatenate([kept, tail[:, None]], axis=-1),
            jnp.concatenate([teacher_kept, teacher_tail[:, None]], axis=-1))
