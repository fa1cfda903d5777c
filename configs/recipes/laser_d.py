"""LASER-D: a bonus for right answers within a length that depends on how hard the question is.

Paper: Liu et al. 2025 (2505.15612).
Constants: Targets of three bands of pass rates, searched again on a monitoring set;
constants of `laser.py`.
The monitoring set (500 questions, 8 answers, every 20 updates) is drawn from the training questions. Guesses as in
`laser.py`.
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
from distill_jax.rollout.reinforce import Monitor


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.28}
    return rl("laser_d", TokenTerm(ppo_clip, kwargs=clip), metrics=clip,
              reward=Reward(fn=LaserD(start=LONGEST)), monitor=Monitor(prompts=500, n=8, every=20), temperature=0.6)
