"""Policy-gradient losses on sampled tokens. Shapes: B rows, T tokens; `tokens.inputs`, `tokens.ratios`.

Each gives -objective at every token, 0 outside the mask. What is averaged over what is not theirs: that is the term's
`per` (`tokens.aggregate`). All read the field `advantages` [B,T] (constant over a sample unless a method says
otherwise); where the stream has a field `policy_mask`, tokens at which it is 0 have value and gradient 0 but still
count in the term's mean (RAIF's superior CoT, AdaCoT's decision token). Advantages, ratios to be multiplied with and
old log-probs carry no gradient.
"""

from typing import Any

import jax.numpy as jnp

from distill_jax.losses.tokens.inputs import Tokens, known, local
from distill_jax.losses.tokens.ratios import BEHAVIOUR, Level, ratio, stop

Array = Any


@local
def reinforce(tokens: Tokens, *, advantages: str = "advantages", old: str = "") -> Array:
    """-A_t log pi(t): [B,T]. Williams 1992; with advantages of correct samples only it is RAFT (2504.11343, eq. 3).

    advantages  field it multiplies with: another one makes weighted SFT of it
    old         not read: there is no ratio. Taken so that `ratios.Corrected` can wrap it
    """
    return _kept(tokens, -tokens.field(advantages) * tokens.logprobs)


@local
def ppo_clip(tokens: Tokens, *, low: float = 0.2, high: float = 0.2, dual: float | None = None, old: str = BEHAVIOUR,
             level: Level = "token") -> Array:
    """-min(r A, clip(r, 1 - low, 1 + high) A): [B,T].

    PPO (Schulman et al. 2017, 1707.06347, eq. 7) and GRPO; two bounds: clip-higher of DAPO (2503.14476, eq. 10).

    dual   c > 1 + high: for A < 0 the value is at most -c A (dual clip, Ye et al. 2020, 1912.09729, eq. 5). Capping
           the ratio itself at c (two-sided clip, 2505.07291) is the same loss
    old    what r is taken against, `tokens.ratios`
    level  what a ratio is of, `tokens.ratios.Level`
    """
    if known(low, high) and (not 0.0 <= low <= 1.0 or high < 0.0):
        raise ValueError(f"ppo_clip keeps the ratio in [1 - low, 1 + high]: low in [0, 1], high >= 0; got low={low}, "
                         f"high={high}")
    if dual is not None and known(dual, high) and dual <= 1.0 + high:
        raise ValueError(f"dual={dual} bounds the ratio beyond the upper clip 1 + high = {1.0 + high}; 3 is usual")
    r, advantages = ratio(tokens, old, level), tokens.field("advantages")
    clipped = jnp.clip(r, 1.0 - low, 1.0 + high)
    if dual is not None:
        r = jnp.minimum(r, dual)
    return _kept(tokens, -jnp.minimum(r * advantages, clipped * advantages))


def gspo(tokens: Tokens, *, low: float = 3e-4, high: float = 4e-4, old: str = BEHAVIOUR) -> Array:
    """-min(s A, clip(s, 1 - low, 1 + high) A), s the geometric mean ratio of the sequence: [B,T].

    GSPO (Zheng et al. 2025, 2507.18071, eq. 5 to 7). The same value at every token of a sequence, so the term needs
    `per="sequence"`. At the usual bounds of PPO nothing would ever be clipped.
    """
    return ppo_clip(tokens, low=low, high=high, old=old, level="sequence")


def gspo_token(tokens: Tokens, *, low: float = 3e-4, high: float = 4e-4, old: str = BEHAVIOUR) -> Array:
    """GSPO with s_t = sg[s] pi(t) / sg[pi(t)]: [B,T]. 2507.18071, eq. 13 and 14.

    The value of `gspo`, and its gradient where A is constant in a sequence; A may differ from token to token.
    """
    return ppo_clip(tokens, low=low, high=high, old=old, level="sequence_token")


@local
def cispo(tokens: Tokens, *, cap: float = 5.0, floor: float = 0.0, old: str = BEHAVIOUR) -> Array:
    """-sg[clip(r, floor, cap)] A log pi(t): [B,T]. CISPO (MiniMax-M1, 2506.13585, eq. 4 and 5; ScaleRL, 2510.13786).

    No token loses its gradient. `floor` and `cap` bound the ratio itself: cap = 1 + epsilon_high where a paper or
    library counts from 1, epsilon_high where it is absolute (TRL, ScaleRL: 5).
    """
    if known(floor, cap) and not 0.0 <= floor < cap:
        raise ValueError(f"cispo needs bounds of the ratio, 0 <= floor < cap, got floor={floor}, cap={cap}")
    weight = stop(jnp.clip(ratio(tokens, old), floor, cap))
    return _kept(tokens, -weight * tokens.field("advantages") * tokens.logprobs)


def _kept(tokens: Tokens, values: Array) -> Array:
    """Zero outside the mask and where `policy_mask` says so."""
    if "policy_mask" in tokens.fields:
        values = jnp.where(tokens.field("policy_mask") != 0, values, jnp.zeros_like(values))
    return tokens.masked(values)
