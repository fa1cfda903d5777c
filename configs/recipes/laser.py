"""LASER: a bonus for right answers within a target length.

Paper: Liu et al. 2025 (2505.15612).
Constants: 1 for right, -0.5 for wrong, -1 without an answer, 0.5 more for a right one of at
most 4,096 tokens; clip 0.2 and 0.28, n = 8, temperature 0.6, learning rate 1e-6.
Guesses: 64 questions a round (theirs 128 in two updates), no KL and no entropy term (theirs 1e-3 each), 300 updates.
Expected: shorter answers at the same accuracy.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/laser.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.shaping_laser import laser


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.28}
    return rl("laser", TokenTerm(ppo_clip, kwargs=clip), metrics=clip,
              reward=Reward(fn=laser, kwargs={"target": 4096}), temperature=0.6)
