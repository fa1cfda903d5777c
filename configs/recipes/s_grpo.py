"""S-GRPO: one full answer and seven that leave its thinking early; a right one is worth more the earlier it left.

Paper: Dai et al. 2025 (2505.07686).
Constants: Eight candidates, exits uniform over the thinking; right answers earn 1, 1/2, 1/4, ... in the order of their
exits; r - mean(r) without a scale; clip of single tokens, a mean for each candidate, no KL; learning rate 1e-6, 16
questions. The string that ends a thinking is theirs.
Guesses: clip 0.2; an exit trains on the answer behind it, the shared thinking is trained on with the full answer alone
(`train_prefix=True`: with every candidate, as the paper writes it); 1,024 tokens for such an answer; 300 updates, the
length is 8,192.
Expected: a third to two thirds fewer tokens at equal or better accuracy (the paper).
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/s_grpo.py --on h200:8` (without the sampling).
"""

from configs.rl import one_of, rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.shaping_modes import early_exit
from distill_jax.rollout.advantages import group_mean
from distill_jax.rollout.environments import EarlyExits


def recipe() -> Recipe:
    policy = rl("s_grpo", TokenTerm(ppo_clip, per="sequence"), prompts=16, n=8, reward=Reward(fn=early_exit),
                advantage=group_mean, environment=EarlyExits(exits=7))
    return Recipe(name="s_grpo", stages=(one_of(policy, "train"),))
