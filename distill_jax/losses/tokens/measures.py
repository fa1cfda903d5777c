"""Numbers to watch beside a policy or preference loss: token "losses" without gradient, for terms of weight 0.

As terms they are averaged over the tokens of the global batch and by role, as losses are: clip fraction or entropy of
thinking and answer apart cost nothing more. Shapes: B rows, T tokens.
"""

from typing import Any, Literal

import jax.numpy as jnp

from distill_jax.losses.tokens.inputs import Tokens, local
from distill_jax.losses.tokens.preference import Pairs, sequence_scores
from distill_jax.losses.tokens.ratios import BEHAVIOUR, Level, log_ratio, ratio, sampler_weights, stop

Array = Any


@local
def clip_fraction(tokens: Tokens, *, low: float = 0.2, high: float = 0.2, old: str = BEHAVIOUR,
                  level: Level = "token") -> Array:
    """1 at the tokens whose gradient PPO's clip takes away (r < 1 - low and A < 0, or r > 1 + high and A > 0): [B,T].
    """
    r, advantages = stop(ratio(tokens, old, level)), tokens.field("advantages")
    cut = ((r < 1.0 - low) & (advantages < 0)) | ((r > 1.0 + high) & (advantages > 0))
    return tokens.masked(cut.astype(r.dtype))


@local
def mean_ratio(tokens: Tokens, *, old: str = BEHAVIOUR, level: Level = "token") -> Array:
    """The importance ratio: [B,T]."""
    return tokens.masked(stop(ratio(tokens, old, level)))


@local
def logprob_gap(tokens: Tokens, *, old: str = BEHAVIOUR) -> Array:
    """|log pi(t) - log old(t)|: [B,T]. Against the sampler, before any update: how far it is from the trainer."""
    return jnp.abs(stop(log_ratio(tokens, old)))


@local
def entropy(tokens: Tokens) -> Array:
    """Entropy in nats: [B,T]."""
    return tokens.masked(stop(tokens.entropies))


@local
def corrected_fraction(tokens: Tokens, *, old: str = "old_logprobs", level: Literal["token", "product"] = "token",
                       cap: float = 2.0, floor: float = 0.0) -> Array:
    """1 at the tokens whose sampler weight is outside [floor, cap], where `Corrected` truncates or masks it: [B,T]."""
    weights = sampler_weights(tokens, old=old, level=level, mode="mask", cap=cap, floor=floor)
    return tokens.masked((weights == 0).astype(weights.dtype))


def sequence_log_ratio(tokens: Tokens, *, beta: float = 1.0) -> Array:
    """beta (log pi(y) - log reference(y)) of the whole segment, at each of its tokens: [B,T]. With beta 1 on mismatched
    answers its mean is KTO's z0."""
    return tokens.masked(beta * stop(sequence_scores(tokens, against=True)))


@local
def logprob(tokens: Tokens) -> Array:
    """log pi(t): [B,T]. Of chosen and of rejected sequences apart: a margin that grows while both fall is what
    preference losses allow and nobody wants."""
    return tokens.masked(stop(tokens.logprobs))


def preference_accuracy(tokens: Tokens, *, average: bool = False) -> Array:
    """1 where the chosen sequence's log ratio to the reference (without one: mean log-prob) is the larger: [B,T].

    average: mean log ratio in place of the sum, what IPO compares.
    """
    return _margin(tokens, lambda x: (x > 0).astype(x.dtype), average)


def preference_margin(tokens: Tokens, *, beta: float = 1.0, average: bool = False) -> Array:
    """beta times (chosen minus rejected log ratio to the reference; without one: mean log-prob), at each token of a
    pair: [B,T]. `average` as in `preference_accuracy`."""
    return _margin(tokens, lambda x: beta * x, average)


def _margin(tokens: Tokens, of: Any, average: bool) -> Array:
    pairs = Pairs.of(tokens)
    scores = tokens.logprobs if tokens.reference is None else tokens.logprobs - tokens.against
    chosen, rejected = (pairs.means if average or tokens.reference is None else pairs.sums)(scores)
    return pairs.values(stop(of(chosen - rejected)))
