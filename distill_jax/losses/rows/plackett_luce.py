"""PLD: the student's logits must produce the ranking "token that stands there first, then as the teacher orders"."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.head import NEG
from distill_jax.losses.rows.outcomes import kept_and_tail, outcomes
from distill_jax.losses.rows.tempering import Temper
from distill_jax.losses.rows.vocabulary import reads
from distill_jax.losses.targets import Full, Target, TopKTarget

Array = Any


@reads(TopKTarget)
def plackett_luce(logits: Array, target: Target, *, temperature: float = 1.0, temper: Temper = "exact") -> Array:
    """sum_k p(pi_k) [log sum_{l>=k} exp z(pi_l) - z(pi_k)], pi = (y, then the teacher's order), z student's logits.

    PLD (2506.12542), the weighted list-wise likelihood: no separate cross-entropy; p = softmax(teacher logits / tau),
    only the teacher is tempered. logits float32 [N,V], y = the target's `token` -> float32 [N]. With p all on y it is
    cross-entropy. Not zero where student = teacher: it goes on growing margins. Ties fall to the smaller id (`Full`)
    or the earlier slot (`TopKTarget`). It sorts.

    Tail: on a `TopKTarget` the bucket stands last, with the log-sum-exp of the logits in it, so the terms of kept ids
    are exact and only the ranking within the tail is left out (a lower bound). A `y` that is not kept is taken out of
    the bucket and ranked first, with the most probability it can have: the smallest kept one, or all of the tail.
    Raises ValueError for a target without `token`.
    """
    log_p = outcomes(jax.lax.stop_gradient(logits), target, temperature, temper)[1]
    token = getattr(target, "token", None)
    if token is None:
        raise ValueError("plackett_luce ranks the token that stands there first: the target has no `token`")
    if isinstance(target, TopKTarget):
        return _ranking_loss(*_topk_ranking(logits, target, token, log_p))
    assert isinstance(target, Full)
    z = jnp.where(log_p > NEG / 2, logits[:, :log_p.shape[-1]].astype(log_p.dtype), NEG)
    first = jnp.arange(log_p.shape[-1], dtype=token.dtype)[None, :] == token[:, None]
    return _ranking_loss(*_sorted(jnp.where(first, -jnp.inf, -log_p), z, jnp.exp(log_p)))


def _topk_ranking(logits: Array, target: TopKTarget, token: Array, log_p: Array) -> tuple[Array, Array]:
    """(scores, weights) [N,K+2] in order: y, kept ids, tail. A slot of its own for y comes before the kept ones."""
    ids = jnp.where(target.logprobs > NEG / 2, target.ids, -1)
    is_y = ids == token[:, None]
    own = jnp.where(jnp.any(is_y, axis=-1), -1, token)[:, None]
    student: Any = kept_and_tail(logits, jnp.concatenate([own, ids], axis=-1), target.grad_dtype)
    scores = jnp.concatenate([student[0], student[1][:, None]], axis=-1)
    there = jax.lax.stop_gradient(scores) > NEG / 2
    kept, tail = log_p[:, :-1], log_p[:, -1]
    most = jnp.minimum(tail, jnp.min(jnp.where(kept > NEG / 2, kept, 0.0), axis=-1))  # what y can have at most
    weights = jnp.where(there, jnp.exp(jnp.concatenate([most[:, None], log_p], axis=-1)), 0.0)
    key = jnp.concatenate([jnp.full_like(own, -2.0, weights.dtype), jnp.where(is_y, -2.0, -weights[:, 1:-1]),
                           jnp.full_like(own, 1.0, weights.dtype)], axis=-1)
    return _sorted(jnp.where(there, key, 2.0), scores, weights)


def _sorted(key: Array, scores: Array, weights: Array) -> tuple[Array, Array]:
    order = jnp.argsort(key, axis=-1, stable=True)
    return jnp.take_along_axis(scores, order, axis=-1), jnp.take_along_axis(weights, order, axis=-1)


@jax.custom_vjp
def _ranking_loss(scores: Array, weights: Array) -> Array:
    """sum_k w_k (log sum_{l>=k} exp s_l - s_k); scores [N,M] NEG and weights [N,M] 0 where there is nothing.

    The gradient is another cumulative log-sum-exp, from the other end: exp(s_j + log sum_{k<=j} w_k / R_k) - w_j with
    R_k the sum over l >= k. Left to autodiff it would keep every level of the scan.
    """
    return _ranking_loss_fwd(scores, weights)[0]


def _ranking_loss_fwd(scores: Array, weights: Array) -> tuple[Array, tuple[Array, ...]]:
    rest = jax.lax.cumlogsumexp(scores, axis=1, reverse=True)
    return jnp.sum(jnp.where(weights > 0, weights * (rest - scores), 0.0), axis=-1), (scores, weights, rest)


def _ranking_loss_bwd(saved: tuple[Array, ...], grad: Array) -> tuple[Array, None]:
    scores, weights, rest = saved
    log_w = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)) - rest, NEG)
    before = jax.lax.cumlogsumexp(log_w, axis=1)
    return grad[:, None] * (jnp.exp(scores + before) - weights), None


_ranking_loss.defvjp(_ranking_loss_fwd, _ranking_loss_bwd)
