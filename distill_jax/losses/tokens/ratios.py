"""Importance ratios between the policy that is trained and the one that sampled. Shapes: B rows, T tokens.

`old` names what the ratio is taken against: a field of the stream (`behaviour_logprobs`: what the sampler said;
`old_logprobs`: what the trainer said before the first of several updates), or "current": the policy itself without
gradient, whose ratio is exactly 1. The latter is right where every rollout is used for one update only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from distill_jax.losses.tokens.inputs import LIMIT, Tokens, segment_means, segment_sums

Array = Any
stop = jax.lax.stop_gradient

CURRENT = "current"
BEHAVIOUR = "behaviour_logprobs"

Level = Literal["token", "sequence", "sequence_token", "product"]
"""token            pi(t) / old(t)
sequence         geometric mean over the segment, (pi(o) / old(o))^(1/|o|): GSPO, AdaptThink
sequence_token   the same value, but each token's gradient goes to itself alone: GSPO-token
product          pi(o) / old(o), the ratio of whole sequences: RLOO"""

LEVELS = ("token", "sequence", "sequence_token", "product")


def log_ratio(tokens: Tokens, old: str = BEHAVIOUR) -> Array:
    """log pi(t) - log old(t) [B,T], not clamped; 0 outside the mask."""
    base = stop(tokens.logprobs) if old == CURRENT else tokens.field(old)
    return tokens.masked(tokens.logprobs - base)


def ratio(tokens: Tokens, old: str = BEHAVIOUR, level: Level = "token") -> Array:
    """The importance ratio at each token [B,T], 1 outside the mask. See `Level`.

    GSPO: Zheng et al. 2025, 2507.18071, eq. 7 (sequence) and 14 (sequence_token). Raises ValueError for another level.
    """
    change = log_ratio(tokens, old)
    if level == "token":
        log = change
    elif level == "sequence":
        log = segment_means(tokens, change)
    elif level == "sequence_token":
        log = stop(segment_means(tokens, change)) + change - stop(change)
    elif level == "product":
        log = segment_sums(tokens, change)
    else:
        raise ValueError(f"level {level!r}: expected one of {LEVELS}")
    return jnp.exp(jnp.clip(tokens.masked(log), -LIMIT, LIMIT))


def sampler_weights(tokens: Tokens, *, old: str, level: Literal["token", "product"] = "token",
                    mode: Literal["truncate", "mask"] = "truncate", cap: float = 2.0, floor: float = 0.0) -> Array:
    """w = old / behaviour at each token [B,T], truncated to [floor, cap], or 0 outside it (`mode="mask"`); no gradient.

    What a sampler computes differs from what the trainer computes for the same weights; w corrects the expectation:
    truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"), masked in IcePop (Ling team 2025). `level="product"`: of the whole segment. Raises ValueError where
    `old` is the sampler itself (nothing to correct) or the bounds are not 0 <= floor < cap.
    """
    if old == BEHAVIOUR:
        raise ValueError(f"old={BEHAVIOUR!r} is the sampler itself: there is no gap to correct. Take the ratio against "
                         f"'old_logprobs' or {CURRENT!r}")
    if not 0.0 <= floor < cap:
        raise ValueError(f"importance weights need 0 <= floor < cap, got floor={floor}, cap={cap}")
    ours = stop(tokens.logprobs) if old == CURRENT else tokens.field(old)
    gap = tokens.masked(ours - tokens.field(BEHAVIOUR))
    if level == "product":
        gap = tokens.masked(segment_sums(tokens, gap))
    elif level != "token":
        raise ValueError(f"level {level!r}: expected 'token' or 'product'")
    weights = jnp.exp(jnp.clip(gap, -LIMIT, LIMIT))
    if mode == "truncate":
        return stop(jnp.clip(weights, floor, cap))
    if mode != "mask":
        raise ValueError(f"mode {mode!r}: expected 'truncate' or 'mask'")
    return stop(jnp.where((weights >= floor) & (weights <= cap), weights, jnp.zeros_like(weights)))


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """Token loss w_t * loss_t, w the `sampler_weights` between the sampler and `old`.

    loss  policy loss (tokens, *, old=, **kwargs) -> [B,T]; it is called with this `old`, and the other settings are
          those of `sampler_weights`
    """

    loss: Callable[..., Array]
    old: str = "old_logprobs"
    level: Literal["token", "product"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: float = 2.0
    floor: float = 0.0

    @property
    def __name__(self) -> str:
        return f"corrected {self.loss.__name__}"

    @property
    def local(self) -> bool:
        return self.level == "token" and getattr(self.loss, "local", False)

    def __call__(self, tokens: Tokens, **kwargs: Any) -> Array:
        weights = sampler_weights(tokens, old=self.old, level=self.level, mode=self.mode, cap=self.cap,
                                  floor=self.floor)
        return weights * self.loss(tokens, old=self.old, **kwargs)
