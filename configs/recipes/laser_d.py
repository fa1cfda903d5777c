"""LASER-D: a bonus for right answers within a length that depends on how hard the question is.

Paper: Liu et al. 2025 (2505.15612).
Constants: Targets of three bands of pass rates, searched again from what was sampled;
constants of `laser.py`.
What differs: the targets come from the answers of the rounds themselves, not from a monitoring set of 500 questions
asked every 20 updates. Guesses as in `laser.py`.
Expected: shorter than `laser.py` on easy questions, not on hard ones.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/laser_d.py --on h200:8` (without the sampling).
"""

from configs.rl import LONGEST, rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.shaping_laser import LaserD


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.28}
    return rl("laser_d", TokenTerm(ppo_clip, kwargs=clip), metrics=clip,
              reward=Reward(fn=LaserD(start=LONGEST)), temperature=0.6)
