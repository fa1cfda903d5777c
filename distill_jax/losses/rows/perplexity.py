"""How much worse than its teacher a student predicts the tokens that stand there."""

from typing import Any

from distill_jax.losses.rows.outcomes import outcomes
from distill_jax.losses.rows.vocabulary import reads
from distill_jax.losses.targets import Target, TopKTarget

Array = Any


@reads(TopKTarget)
def log_perplexity_ratio(logits: Array, target: Target) -> Array:
    """log p(y) - log q(y), p teacher, q student, y the token that stands there; its mean is log(ppl_q / ppl_p).

    logits float32 [N,V] -> float32 [N]. The target is a `token` signal (one known outcome). DDK (2407.16154) takes
    exp of the mean over a domain's held-out tokens. Raises ValueError for a target of several outcomes.
    """
    if not isinstance(target, TopKTarget) or target.ids.shape[-1] != 1:
        raise ValueError("log_perplexity_ratio needs a signal of kind token (distill-jax score --signal token), got "
                         f"{type(target).__name__}")
    log_q, log_p = outcomes(logits, target)
    return log_p[:, 0] - log_q[:, 0]
