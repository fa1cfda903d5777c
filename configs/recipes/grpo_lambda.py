"""GRPO-lambda: the length penalty only for the groups of a batch with the highest pass rate.

Paper: Dai et al. 2025 (2505.18086).
Constants: The best fifth of the groups gets 1 - alpha sigmoid(z of the length among right
answers), the others 1 or 0; alpha 0.2 and the fifth are recalled, not read. Guesses as in `grpo.py`.
Expected: shorter answers without the collapse of a penalty for all.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/grpo_lambda.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.shaping import top_groups


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.28}
    return rl("grpo_lambda", TokenTerm(ppo_clip, kwargs=clip), metrics=clip,
              reward=Reward(fn=top_groups, kwargs={"share": 0.2, "alpha": 0.2}))
