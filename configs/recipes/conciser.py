"""ConciseR: first RL that lets the thinking grow, then RL in which brevity pays where all answers are right.

Paper: Song et al. 2025 (2505.21178).
Constants: the first stage is `dapo.py`; the second GRPO with the higher upper clip and token means. The length reward
1 - L / L_max and its weight are guesses (the paper's form could not be read), as are 64 questions, 8 answers, 300
updates a stage (theirs: few). Advantages of the second without the standard deviation, or one token more would count as
much as a thousand.
Expected: shorter answers, accuracy kept.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/conciser.py --on h200:8` (without the sampling).
"""

from configs.recipes.dapo import dapo
from configs.rl import LONGEST, one_of, rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.shaping import concise
from distill_jax.rollout.advantages import group_mean


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.28}
    brevity = rl("conciser", TokenTerm(ppo_clip, kwargs=clip), metrics=clip,
                 reward=Reward(fn=concise, kwargs={"limit": LONGEST}), advantage=group_mean)
    return Recipe(name="conciser", stages=(one_of(dapo("conciser"), "long"),
                                           one_of(brevity, "short", model="stage:long")))
