"""PEAR: a right answer is worth less the more uncertain its thinking was, compared with its answer.

Paper: Huang et al. 2025 (2510.08026).
Constants: min(1, 1 - max(0, H_think - alpha H_answer)) for right answers, 0 for wrong ones,
alpha 1, temperature 0.6.
What differs: entropies are means of -log p of the sampled tokens, an unbiased estimate of those the paper computes over
the vocabulary. Guesses as in `grpo.py`.
Expected: much shorter thinking, accuracy about kept.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/pear.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.shaping_modes import phase_entropy


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.28}
    return rl("pear", TokenTerm(ppo_clip, kwargs=clip), metrics=clip,
              reward=Reward(fn=phase_entropy), temperature=0.6)
