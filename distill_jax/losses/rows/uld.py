"""Losses between two vocabularies: probabilities compared by rank, not by id.

Shapes: N rows, V vocabulary, K kept outcomes. A `TopKTarget` from a teacher of another vocabulary numbers the outcomes
the student has no id for from `FOREIGN` on (`core.batch`); ranks need no ids, so they take part like all others.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.batch import FOREIGN
from distill_jax.core.head import NEG, wide
from distill_jax.losses.rows.divergences import generalized_jsd
from distill_jax.losses.rows.outcomes import ABSENT, kept_and_tail, log_normalizer
from distill_jax.losses.rows.tempering import untempered
from distill_jax.losses.targets import Full, Target, TopKTarget

Array = Any


def uld(logits: Array, target: Target, *, temperature: float = 1.0) -> Array:
    """sum_i |q_(i) - p_(i)|, both sorted descending, the shorter one padded with zeros; q student, p teacher.

    Universal Logit Distillation (Boizard et al. 2024, 2402.12030), its closed form: the Wasserstein distance when
    moving mass between any two tokens costs the same. logits float32 [N,V] -> float32 [N], in [0, 2], symmetric; 0 for
    a student that puts the right masses on wrong tokens, so it goes beside a cross-entropy. The order is not
    differentiated.

    `Full`: all ids, either V. `temperature` divides both sides' logits; there is no factor tau^2 (as published).
    `TopKTarget`: the student's K most probable ids (as many as the teacher has kept) against the teacher's kept
    outcomes, and the two tails as one number each: |tail_q - tail_p|, a lower bound of what the tails would add. Only
    temperature 1, and K >= 2: the one outcome of a `token` signal need not be the teacher's first.
    """
    if isinstance(target, Full):
        return jnp.sum(jnp.abs(_paired(logits, target.logits, temperature)), axis=-1)
    if not isinstance(target, TopKTarget):
        raise ValueError(f"uld needs the teacher's most probable outcomes, a Full or TopKTarget target, got "
                         f"{type(target).__name__}; name a topk signal or a provider as the term's target")
    if temperature != 1.0:
        raise untempered(temperature, "or a provider as the target")
    if target.ids.shape[-1] < 2:
        raise ValueError("uld compares ranks, and this signal holds one outcome a token, which need not be the "
                         "teacher's most probable one; score with --signal topk:K, K at least 2")
    logits = logits.astype(wide(logits))
    there, logprobs = _stored(target, logits.dtype)
    return _by_rank(logits, logprobs, there, target.ids[:, :0], target.grad_dtype)


def hybrid_uld(logits: Array, target: Target, *, beta: float = 0.5, matched: float = 1.0, unmatched: float = 1.0
               ) -> Array:
    """matched * JSD_beta(p || q on the ids both have) + unmatched * ULD(p, q on the rest); q student, p teacher.

    The hybrid loss of GOLD (Patino et al. 2025, "Unlocking on-policy distillation for any model family", and TRL's
    `GOLDTrainer`). logits float32 [N,V], a `TopKTarget` -> float32 [N] >= 0, 0 where the student agrees.

    First part: `generalized_jsd` (beta 0 forward KL(p||q), 1 reverse) over the kept outcomes that have an id here, and
    one bucket for everything else: it stays a divergence (TRL compares the bare sub-probabilities, whose "KL" can be
    negative). Second part: the kept outcomes without an id (m of them, sorted) against the student's m most probable
    ids that are not among the first part's, then what is left of both as one number each. A student's id counts as
    "rest" when the teacher has not kept it; TRL asks whether its vocabulary has it, which no top-k signal tells.

    Where everything has an id the second part compares two tails, and the whole is a divergence with the tail counted
    once more. Raises ValueError for other targets: ids of two vocabularies mean nothing to each other unless the signal
    has mapped them.
    """
    if not isinstance(target, TopKTarget):
        raise ValueError(f"hybrid_uld needs a topk signal whose ids `distill-jax score` has mapped, got "
                         f"{type(target).__name__}; score with --signal topk:K, or use uld")
    logits = logits.astype(wide(logits))
    there, logprobs = _stored(target, logits.dtype)
    foreign = there & (target.ids >= FOREIGN)
    known = jnp.where(there & ~foreign, target.ids, -1)
    first = generalized_jsd(logits, TopKTarget(known, target.logprobs, target.grad_dtype), beta=beta)
    return matched * first + unmatched * _by_rank(logits, logprobs, foreign, known, target.grad_dtype)


def _stored(target: TopKTarget, dtype: Any) -> tuple[Array, Array]:
    """(bool [N,K]: outcomes that are there, log-probs [N,K])."""
    logprobs = jax.lax.stop_gradient(target.logprobs.astype(dtype))
    return (target.ids >= 0) & (logprobs > ABSENT), logprobs


def _by_rank(logits: Array, logprobs: Array, ranked: Array, known: Array, grad_dtype: Any) -> Array:
    """L1 between the teacher's `ranked` outcomes [N,K] and as many of the student's most probable ids besides `known`
    [N,K] (-1: none; or [N,0]), both sorted, plus the L1 between what neither these nor `known` hold."""
    row = jnp.arange(logits.shape[0])[:, None]
    inside = (known >= 0) & (known < logits.shape[-1])
    still = jax.lax.stop_gradient(logits)
    still = still.at[row, jnp.where(inside, known, logits.shape[-1])].set(NEG, mode="drop")
    k = min(ranked.shape[-1], logits.shape[-1])
    top, ids = jax.lax.top_k(still, k)
    ids = jnp.where((jnp.arange(k)[None] < jnp.sum(ranked, axis=-1)[:, None]) & (top > ABSENT), ids, -1)
    student: Any = kept_and_tail(logits, jnp.concatenate([ids, known], axis=-1), grad_dtype)
    q, q_tail = student
    mass = lambda x: jnp.where(x > ABSENT, jnp.exp(x), 0.0)
    p = -jnp.sort(-jnp.where(ranked, jnp.exp(logprobs), 0.0), axis=-1)
    # A known id that the student's head does not have is in its tail, so in the teacher's too.
    held = ranked | (q[:, k:] > ABSENT) if known.shape[-1] else ranked
    p_tail = jnp.clip(1.0 - jnp.sum(jnp.where(held, jnp.exp(logprobs), 0.0), axis=-1), 0.0, 1.0)
    student = jnp.pad(mass(q[:, :k]), ((0, 0), (0, ranked.shape[-1] - k)))
    return jnp.sum(jnp.abs(student - p), axis=-1) + jnp.abs(mass(q_tail) - p_tail)


def _paired(logits: Array, teacher: Array, temperature: float) -> Array:
    """Difference [N, max V] of the sorted probabilities of two heads; ids that do not exist have none."""
    sides = (logits.astype(wide(logits)), jax.lax.stop_gradient(teacher.astype(wide(logits))))
    width = max(x.shape[-1] for x in sides)
    out = []
    for x in sides:
        z = jnp.where(x > ABSENT, x / temperature, NEG)
        norm: Array = log_normalizer(z)
        p = jnp.exp(z - norm[:, None])
        out.append(jnp.pad(-jnp.sort(-p, axis=-1), ((0, 0), (0, width - x.shape[-1]))))
    return out[0] - out[1]
