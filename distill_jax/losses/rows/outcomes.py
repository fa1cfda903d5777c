"""Student and teacher as log-probabilities over the same outcomes: what every divergence is written on.

Shapes: N rows, V vocabulary, K kept outcomes, M compared outcomes. For a `Full` target the outcomes are the ids both
heads have (M = min of the two V). For a `TopKTarget` they are the K kept ids and one tail bucket (M = K + 1):
the teacher's tail is `1 - sum(kept)`, the student's the mass of every id that is not kept, so nothing is renormalised
and an f-divergence of the M outcomes is a lower bound of the full one (data processing inequality).
A `SampledTarget` says nothing about single outcomes; see `drawn`.

An outcome that one side cannot have (padding of K, padded vocabulary, ids the student lacks) is `NEG` on both sides,
and contributes exactly zero to value and gradient. Everything is float32 (float64 where the logits are).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.head import NEG, wide
from distill_jax.losses.rows.tempering import Temper, check_temper, tail_bounds, untempered
from distill_jax.losses.rows.vocabulary import (
    Part,
    first_id,
    greatest,
    here,
    over_outcomes,
    spread,
    summed,
)
from distill_jax.losses.targets import Full, SampledTarget, Target, TopKTarget

Array = Any

TAIL_FLOOR = 1e-7
"""Smallest tail mass a teacher may have: float32 cannot tell 1 - sum(kept) from 0 below this."""

ABSENT = NEG / 2  # logits below it belong to ids that do not exist


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def log_normalizer(logits: Array, part: Part | None = None) -> Array:
    """log sum exp over the last axis, and over the parts of the vocabulary that it is cut into. logits [N,V] -> [N].

    The gradient is recomputed from the logits, so no second [N,V] array outlives the forward pass; calls on the same
    logits (several terms) are merged by the compiler.
    """
    top = greatest(jnp.max(logits, axis=-1), part)
    return top + jnp.log(summed(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1), part))


def _log_normalizer_fwd(logits: Array, part: Part | None) -> tuple[Array, tuple[Array, Array]]:
    out = log_normalizer(logits, part)
    return out, (logits, out)


def _log_normalizer_bwd(part: Part | None, saved: tuple[Array, Array], grad: Array) -> tuple[Array]:
    logits, out = saved
    return (grad[:, None] * jnp.exp(logits - out[:, None]),)


log_normalizer.defvjp(_log_normalizer_fwd, _log_normalizer_bwd)


def kept_and_tail(logits: Array, ids: Array, grad_dtype: Any = None) -> tuple[Array, Array]:
    """Student log-probabilities of the kept ids and of all others together.

    logits [N,V], ids int32 [N,K] unique or absent (-1, or not an id of the student) ->
    (kept [N,K], tail [N]), NEG where an id is absent and where no id is left for the tail. `grad_dtype` as in
    `TopKTarget`.

    The tail is a log-sum-exp over the ids that are not kept, not log(1 - sum): that loses every digit once the
    student is confident, and its gradient is then a difference of huge numbers.
    """
    return _kept_and_tail(logits, ids, grad_dtype, here())


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _kept_and_tail(logits: Array, ids: Array, grad_dtype: Any, part: Part | None) -> tuple[Array, Array]:
    return _kept_and_tail_fwd(logits, ids, grad_dtype, part)[0]


def _kept_and_tail_fwd(logits: Array, ids: Array, grad_dtype: Any, part: Part | None
                       ) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    rows, vocab = logits.shape
    at = ids - first_id(vocab, part)
    inside = (ids >= 0) & (at >= 0) & (at < vocab)
    z = jnp.take_along_axis(logits, jnp.where(inside, at, 0), axis=-1)
    present = inside & (z > ABSENT)
    slots = jnp.where(present, at, vocab)  # out of range: dropped by the scatters
    if part:  # one device has each of them
        z, found = summed(jnp.stack([jnp.where(present, z, 0.0), present.astype(z.dtype)]), part)
        present = found > 0
    row = jnp.arange(rows)[:, None]
    is_kept = jnp.zeros((rows, vocab), bool).at[row, slots].set(True, mode="drop")
    # `where` outside the exponential: the two reductions then read the logits, not a masked copy of them.
    top = greatest(jnp.max(jnp.where(is_kept, NEG, logits), axis=-1), part)
    has_tail = top > ABSENT
    rest = jnp.where(is_kept, 0.0, jnp.exp(logits - jnp.where(has_tail, top, -NEG)[:, None]))
    rest = summed(jnp.sum(rest, axis=-1), part)
    tail_norm = jnp.where(has_tail, top + jnp.log(jnp.where(has_tail, rest, 1.0)), NEG)
    norm = jnp.logaddexp(tail_norm, log_normalizer(jnp.where(present, z, NEG)))
    kept = jnp.where(present, z - norm[:, None], NEG)
    tail = jnp.where(has_tail, tail_norm - norm, NEG)
    return (kept, tail), (logits, slots, is_kept, norm, tail_norm, kept, tail)


def _kept_and_tail_bwd(grad_dtype: Any, part: Part | None, saved: tuple[Array, ...], grads: tuple[Array, Array]
                       ) -> tuple[Array, None]:
    logits, slots, is_kept, norm, tail_norm, kept, tail = saved
    g_kept = jnp.where(kept > ABSENT, grads[0], 0.0)
    g_tail = jnp.where(tail > ABSENT, grads[1], 0.0)
    total = jnp.sum(g_kept, axis=-1) + g_tail
    tail_norm = jnp.where(tail > ABSENT, tail_norm, -NEG)  # exp(logits - tail_norm) = 0 without a tail
    others = g_tail[:, None] * jnp.exp(logits - tail_norm[:, None]) - total[:, None] * jnp.exp(logits - norm[:, None])
    # Set, not add: the kept entries of `others` may be huge where the tail is tiny, and would cancel badly.
    row = jnp.arange(logits.shape[0])[:, None]
    exact = g_kept - total[:, None] * jnp.exp(kept)
    dtype = grad_dtype or logits.dtype
    out = jnp.where(is_kept, 0.0, others).astype(dtype).at[row, slots].set(exact.astype(dtype), mode="drop")
    return out.astype(logits.dtype), None


_kept_and_tail.defvjp(_kept_and_tail_fwd, _kept_and_tail_bwd)


def outcomes(logits: Array, target: Target, temperature: Any = 1.0, temper: Temper = "exact") -> tuple[Array, Array]:
    """(log q, log p) [N,M] of student and teacher over the same outcomes; no gradient through log p.

    logits [N,V]. `temperature` divides both sides' logits. The student's side is always exact; the teacher's only
    where every outcome is known, so that a `TopKTarget` refuses another one than 1 unless `temper` says what to take
    for the tail. Raises ValueError for that, for a temperature that is not positive, for `Labels` and
    `SampledTarget`.
    """
    check_temper(temperature, temper)
    if isinstance(target, Full):
        return _full(logits, target, temperature)
    if isinstance(target, TopKTarget):
        if isinstance(temperature, int | float) and temperature == 1:
            return _topk(logits, target)
        if temper == "exact":
            raise untempered(temperature, "a full target (a teacher on the mesh or a `hidden` signal), or "
                             "temper='student', which bounds what it does (losses/rows/tempering.py)")
        return _topk_tempered(logits, target, temperature, temper)
    if isinstance(target, SampledTarget):
        raise ValueError(
            "this loss is not linear in the teacher's probabilities, and a sampled signal gives only their means. Use "
            "cross_entropy or forward_kl at temperature 1 on it, or for this loss a topk or hidden signal or a "
            "teacher on the mesh")
    raise ValueError(f"expected a Full or TopKTarget target, got {type(target).__name__}: this loss compares "
                     "distributions; name a signal or a provider as the term's target, not 'tokens'")


def drawn(logits: Array, target: SampledTarget) -> tuple[Array, Array]:
    """(log q, w) [N,S] of the outcomes that were drawn, w their shares; no gradient through w.

    logits [N,V]. log q is NEG and w 0 where an id is absent or the student lacks it.
    """
    logits = logits.astype(wide(logits))
    weights = jax.lax.stop_gradient(target.weights.astype(logits.dtype))
    student: Any = kept_and_tail(logits, jnp.where(weights > 0, target.ids, -1), target.grad_dtype)
    return student[0], jnp.where(jax.lax.stop_gradient(student[0]) > ABSENT, weights, 0.0)


def _full(logits: Array, target: Full, temperature: Any) -> tuple[Array, Array]:
    vocab = min(logits.shape[-1], target.logits.shape[-1])
    z = logits[:, :vocab].astype(wide(logits))
    t = jax.lax.stop_gradient(target.logits[:, :vocab].astype(z.dtype))
    real = (z > ABSENT) & (t > ABSENT)
    z = jnp.where(real, z / temperature, NEG)
    t = jnp.where(real, t / temperature, NEG)
    return log_softmax(z, target), log_softmax(t, target)


def log_softmax(x: Array, target: Target) -> Array:
    """x - log sum exp x over the outcomes that `target` gives. [N,M] -> [N,M]."""
    part = over_outcomes(target)
    return x - spread(log_normalizer(x, part), part)


def _topk(logits: Array, target: TopKTarget) -> tuple[Array, Array]:
    logits = logits.astype(wide(logits))
    ids, logprobs = _stored(target, logits.dtype)
    student: Any = kept_and_tail(logits, ids, target.grad_dtype)
    teacher_kept, teacher_tail = _teacher(logprobs, *jax.lax.stop_gradient(student))
    return _joined(*student), _joined(teacher_kept, teacher_tail)


def _topk_tempered(logits: Array, target: TopKTarget, temperature: Any, temper: Temper) -> tuple[Array, Array]:
    """The student exactly; the teacher's kept outcomes up to the common factor that S decides (`tempering`)."""
    logits = logits.astype(wide(logits))
    real = logits > ABSENT
    hot = jnp.where(real, logits / temperature, NEG)
    ids, logprobs = _stored(target, logits.dtype)
    student: Any = kept_and_tail(hot, ids, target.grad_dtype)
    kept, tail = jax.lax.stop_gradient(student)
    teacher_kept, log_mass = _teacher(logprobs, kept, tail)
    lacking = (ids >= 0) & (kept <= ABSENT)  # known to the teacher, but in this student's tail
    count = summed(jnp.sum(real, axis=-1), here()) - jnp.sum(kept > ABSENT, axis=-1) + jnp.sum(lacking, axis=-1)
    smallest = jnp.min(jnp.where(ids >= 0, logprobs, 0.0), axis=-1)
    top_is_known = ~jnp.any(lacking, axis=-1) & (ids.shape[-1] > 1)  # one kept id need not be the most probable
    log_top = jnp.where(top_is_known, jnp.minimum(smallest, log_mass), log_mass)
    even, packed = tail_bounds(log_mass, log_top, count, temperature)
    log_s = {"even": even, "packed": packed}.get(temper)
    if log_s is None:
        z = jax.lax.stop_gradient(logits)
        cold: Any = kept_and_tail(z, ids)
        of_student = tail + log_normalizer(jax.lax.stop_gradient(hot), here()) - log_normalizer(z, here()) / temperature
        log_s = jnp.clip(of_student + (log_mass - cold[1]) / temperature, jnp.minimum(even, packed),
                         jnp.maximum(even, packed))
    there = jnp.concatenate([kept, tail[:, None]], axis=-1) > ABSENT
    teacher = jnp.where(there, _joined(teacher_kept / temperature, log_s), NEG)
    norm: Any = log_normalizer(teacher)
    return _joined(*student), jnp.where(there, teacher - norm[:, None], NEG)


def _stored(target: TopKTarget, dtype: Any) -> tuple[Array, Array]:
    """(ids, logprobs) with -1 where nothing is stored; no gradient."""
    logprobs = jax.lax.stop_gradient(target.logprobs.astype(dtype))
    return jnp.where((target.ids >= 0) & (logprobs > ABSENT), target.ids, -1), logprobs


def _teacher(logprobs: Array, kept: Array, tail: Array) -> tuple[Array, Array]:
    """The teacher's (kept [N,K], tail [N]) for a student's: NEG where the student's is, the rest is tail."""
    teacher_kept = jnp.where(kept > ABSENT, logprobs, NEG)
    mass = 1.0 - jnp.sum(jnp.exp(teacher_kept), axis=-1)
    return teacher_kept, jnp.where(tail > ABSENT, jnp.log(jnp.clip(mass, TAIL_FLOOR, 1.0)), NEG)


def _joined(kept: Array, tail: Array) -> Array:
    return jnp.concatenate([kept, tail[:, None]], axis=-1)
