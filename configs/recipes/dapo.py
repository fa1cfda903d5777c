"""DAPO: a higher upper clip, groups of equal rewards replaced, means over tokens, a soft limit of length; no KL.

Paper: Yu et al. 2025 (2503.14476).
Constants: Clip 0.2 and 0.28, rewards 1 and -1, the overlong punishment over the last fifth of
the length (theirs 4,096 of 20,480), up to 9 further samplings (their reproduction: 10 batches in all), n = 16.
Guesses: 32 questions a round, one update a round (theirs 16), 300 updates; the length is 8,192.
Expected: above `grpo.py` in the paper, most of it by the filter and the token mean.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/dapo.py --on h200:8` (without the sampling).
"""

from typing import Any

from configs.rl import LONGEST, rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward, Sum
from distill_jax.rewards.outcome import outcome
from distill_jax.rewards.shaping import soft_overlong


def dapo(name: str, longest: int = LONGEST, **reinforce: Any) -> Recipe:
    """DAPO for answers of at most `longest` tokens, with further fields of `Reinforce`."""
    clip = {"low": 0.2, "high": 0.28}
    reward = Sum(parts={"right": Reward(fn=outcome, kwargs={"wrong": -1.0}),
                        "overlong": Reward(fn=soft_overlong, kwargs={"limit": longest, "cache": longest // 5})})
    return rl(name, TokenTerm(ppo_clip, kwargs=clip), metrics=clip, prompts=32, n=16, reward=reward, refill=9,
              **reinforce)


def recipe() -> Recipe:
    return dapo("dapo")
