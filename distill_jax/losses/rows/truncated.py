"""Top-k KD as most trainers do it: the kept probabilities made to sum to 1, the tail forgotten. To compare with."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.head import NEG
from distill_jax.losses.rows.outcomes import kept_and_tail, log_normalizer
from distill_jax.losses.rows.vocabulary import reads
from distill_jax.losses.targets import Target, TopKTarget

Array = Any


@reads(TopKTarget)
def truncated_kl(logits: Array, target: Target) -> Array:
    """KL(t || q), t = p / sum of the kept p over the K kept ids, q student. logits float32 [N,V] -> float32 [N].

    The "top-k" of 2503.16870, which shows it biased: the minimum is q = t, a student surer than the teacher by a factor
    of 1 / (kept mass) and without a tail. Use `forward_kl`, whose tail bucket has the minimum q = p on the kept ids.
    (FIRST, 2408.12168, divides q by its kept sum too; then nothing says how much mass belongs outside.)
    Raises ValueError for a target that is not top-k.
    """
    if not isinstance(target, TopKTarget):
        raise ValueError(f"truncated_kl needs a top-k signal, got {type(target).__name__}: with every outcome known "
                         "there is nothing to leave out; use forward_kl")
    logprobs = jax.lax.stop_gradient(target.logprobs)
    student: Any = kept_and_tail(logits, jnp.where(logprobs > NEG / 2, target.ids, -1), target.grad_dtype)
    log_q = student[0]
    log_p = jnp.where(jax.lax.stop_gradient(log_q) > NEG / 2, logprobs.astype(log_q.dtype), NEG)
    norm: Array = log_normalizer(log_p)
    log_t = jnp.where(log_p > NEG / 2, log_p - norm[:, None], NEG)
    return jnp.sum(jnp.exp(log_t) * (log_t - log_q), axis=-1)
