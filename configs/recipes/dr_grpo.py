"""Dr.GRPO: GRPO without both normalisations: no standard deviation, every token weighs the same.

Paper: Liu et al. 2025 (2503.20783).
Constants: Advantages R - mean, sums over tokens divided by the longest answer, n = 8, no KL,
learning rate 1e-6.
Guesses: 64 questions and one update a round, 300 updates; the length is 8,192 (theirs 3,000).
Expected: the accuracy of `grpo.py` with shorter wrong answers.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/dr_grpo.py --on h200:8` (without the sampling).
"""

from configs.rl import LONGEST, rl
from distill_jax.losses.tokens.aggregate import ConstantLength
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rollout.advantages import group_mean


def recipe() -> Recipe:
    return rl("dr_grpo", TokenTerm(ppo_clip, per=ConstantLength(length=LONGEST)), advantage=group_mean)
