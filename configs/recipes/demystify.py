"""Demystifying Long CoT: a cosine of the length as reward, and a discounted penalty for repetition; PPO with a critic.

Paper: Yeo et al. 2025 (2502.03373).
Constants: Right: 2 for short to 1 for long; wrong: -10 for short to 0 for long; -10 beyond. Every token of a 40-gram
that was said before loses 0.05, discounted by 0.99; the outcome is not discounted, lambda 1 (one critic for both).
KL 0.01, learning rates 5e-7 and 9e-6 (critic).
Guesses: the KL in the reward, 64 questions, 8 answers (theirs 512 and 16), one update a round, 300 updates. Their code
has a sparse penalty as well: `Where(reward=Reward(fn=ngram_penalty), on=wrong)`.
Expected: lengths that stay within the context; without the cosine they grow beyond.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/demystify.py --on h200:8` (without the sampling).
"""

from configs.rl import LONGEST, rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward, Sum
from distill_jax.rewards.repetition import dense_penalty
from distill_jax.rewards.shaping import cosine
from distill_jax.rollout.estimators import Channel, Gae


def recipe() -> Recipe:
    repetition = Channel(fn=dense_penalty, kwargs={"n": 40, "penalty": -0.05}, gamma=0.99)
    advantage = Gae(gamma=1.0, lam=1.0, critic="critic", reference="reference", beta=0.01,
                    channels={"repetition": repetition})
    return rl("demystify", TokenTerm(ppo_clip), reference=True, critic=9e-6, lr=5e-7, advantage=advantage,
              equal="keep", reward=Sum(parts={"cosine": Reward(fn=cosine, kwargs={"limit": LONGEST})}))
