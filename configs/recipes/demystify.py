"""Demystifying Long CoT: a cosine of the length as reward, and a penalty for repetition.

Paper: Yeo et al. 2025 (2502.03373).
Constants: Right: 2 for short to 1 for long; wrong: -10 for short to 0 for long; -10 beyond.
Wrong answers that repeat n-grams lose up to 1 (their sparse variant).
What differs: GRPO's group baseline in place of PPO with a critic, one discount. Guesses as in `grpo.py`.
Expected: lengths that stay within the context; without it they grow beyond.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/demystify.py --on h200:8` (without the sampling).
"""

from configs.rl import LONGEST, rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward, Sum, Where
from distill_jax.rewards.outcome import wrong
from distill_jax.rewards.repetition import ngram_penalty
from distill_jax.rewards.shaping import cosine


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.28}
    return rl("demystify", TokenTerm(ppo_clip, kwargs=clip), metrics=clip,
              reward=Sum(parts={"cosine": Reward(fn=cosine, kwargs={"limit": LONGEST}),
                                "repetition": Where(reward=Reward(fn=ngram_penalty), on=wrong)}))
