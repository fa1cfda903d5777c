"""Losses on part of the tokens: those where the student is most uncertain (SE-KD, Tavor et al. 2026, 2602.01395).

The paper takes the top share of each batch by student entropy. Here a token is taken when its entropy exceeds a
threshold that comes from outside (`objective.controllers.EntropyQuantile` follows the quantile): whether one token is
taken then depends on nothing but that token, so the gradient is the same however a batch is cut into micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.rows.logprob import entropy
from distill_jax.losses.rows.vocabulary import Reads, reads, reads_of
from distill_jax.losses.targets import Full, Known, Labels, SampledTarget, Target, TopKTarget

Array = Any


@reads(Labels, Full, TopKTarget, SampledTarget, Known, whole=True)
def uncertain(logits: Array, target: Target | None = None, *, threshold: Array) -> Array:
    """1 where the student's entropy H(q) is above `threshold` nats, else 0. logits float32 [N,V] -> float32 [N].

    Carries no gradient. As a term of weight 0 it measures the share of tokens that a `Selective` loss takes.
    """
    above = jax.lax.stop_gradient(entropy(logits)) > jnp.asarray(threshold, logits.dtype)
    return jnp.where(above, jnp.ones((), logits.dtype), jnp.zeros((), logits.dtype))


@dataclass(frozen=True, kw_only=True)
class Selective:
    """Row loss 1[H(q) > threshold] / share * loss: `loss` where the student is uncertain, 0 elsewhere.

    `share` is the part of the tokens that the threshold is steered to. A term divides by all its tokens; with the
    factor 1/share the sum stands for the mean over those taken, as in 2602.01395, once the threshold has settled.

    loss   row loss (logits [N,V], target, **kwargs) -> [N]
    share  part of the tokens that is taken, in (0, 1]
    """

    loss: Callable[..., Array]
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"Selective.share is a part of the tokens in (0, 1], got {self.share}")

    @property
    def __name__(self) -> str:
        return f"selective {self.loss.__name__}"

    @property
    def reads(self) -> Reads:
        return Reads(reads_of(self.loss).kinds, whole=True)

    def __call__(self, logits: Array, target: Target, *, threshold: Array, **kwargs: Any) -> Array:
        """logits float32 [N,V], threshold in nats -> float32 [N]."""
        values = self.loss(logits, target, **kwargs)
        return jnp.where(uncertain(logits, threshold=threshold) > 0, values / self.share, jnp.zeros_like(values))
