"""Top-k distributions made to sum to 1: what most trainers do with stored top-k, and another loss than KL.

Declared as such, for comparison and for methods that are defined so. Everywhere else the tail stays a bucket.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from distill_jax.core.head import NEG
from distill_jax.losses.rows.outcomes import kept_and_tail
from distill_jax.losses.targets import Target, TopKTarget

Array = Any


def renormalized_kl(logits: Array, target: Target, *, sides: Literal["both", "teacher"] = "both",
                    temperature: float = 1.0, smoothing: float = 0.0) -> Array:
    """KL(t || s) over the K kept ids, t = p / sum of the kept p. logits float32 [N,V], TopKTarget -> float32 [N].

    sides "both": s = q / sum of the kept q, FIRST (2408.12168), section 3.2: logits outside the kept ids get no
    gradient, so nothing says how much mass belongs there. sides "teacher": s = q, the usual sparse KD (biased, 2503.16870
    section 3): its minimum is q = t, a student that is surer than the teacher by 1 / (kept mass).
    FIRST recalibrates its teacher: t proportional to p^(1/`temperature`), exact here as nothing but ratios counts, or
    `smoothing` d: the most probable loses d and the other K - 1 share it. The student is not tempered. (FIRST's code
    subtracts d from log-probabilities, and of the student too; this is what the paper means.)
    Raises ValueError for a target that is not top-k, a temperature that is not positive, smoothing outside [0, 1).
    """
    if not isinstance(target, TopKTarget):
        raise ValueError(f"renormalized_kl needs a top-k signal, got {type(target).__name__}: with every outcome known "
                         "there is nothing to renormalise; use forward_kl")
    if sides not in ("both", "teacher") or not temperature > 0 or not 0 <= smoothing < 1:
        raise ValueError("renormalized_kl needs sides 'both' or 'teacher', temperature > 0 and 0 <= smoothing < 1, got "
                         f"{sides!r}, {temperature}, {smoothing}")
    student: Any = kept_and_tail(logits, jnp.where(target.logprobs > NEG / 2, target.ids, -1), target.grad_dtype)
    log_s = student[0]
    there = jax.lax.stop_gradient(log_s) > NEG / 2
    t = _recalibrated(jnp.where(there, jax.lax.stop_gradient(target.logprobs), NEG), temperature, smoothing)
    if sides == "both":
        log_s = jnp.where(there, log_s, NEG) - jax.nn.logsumexp(log_s, axis=-1, where=there)[:, None]
    return jnp.sum(jnp.where(t > 0, t * (jnp.log(jnp.where(t > 0, t, 1.0)) - log_s), 0.0), axis=-1)


def _recalibrated(logprobs: Array, temperature: float, smoothing: float) -> Array:
    """Kept log-probabilities [N,K], NEG where absent -> what the student is to have of them, summing to 1."""
    there = logprobs > NEG / 2
    t = jnp.where(there, jax.nn.softmax(jnp.where(there, logprobs / temperature, NEG), axis=-1), 0.0)
    if not smoothing:
        return t
    others = jnp.sum(there, axis=-1, keepdims=True) - 1
    top = jnp.arange(t.shape[-1])[None, :] == jnp.argmax(t, axis=-1)[:, None]
    moved = jnp.where(top, t - smoothing, t + smoothing / jnp.maximum(others, 1).astype(t.dtype))
    return jnp.where(there & (others > 0), moved, t)
