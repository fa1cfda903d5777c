"""AlphaMed: RL on multiple choice from an instruct model, rewarded by the boxed letter alone.

Paper: Liu et al. 2025 (2505.17952): no distilled traces, no format reward.
Constants: n = 8, temperature 1, KL 0 (the re-run in
AdaThink-Med has 0.01), learning rate 1e-6, 300 updates; clip 0.2 and 0.28 as in that re-run.
Questions: a mixture of difficulties (theirs: all of MedQA and 1,600 of each level of MedMCQA).
Start: an instruct model, `--set student=Qwen/Qwen2.5-7B-Instruct`. Guess: 64 questions a round (theirs 512).
Expected: reasoning appears without having been shown.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/alphamed.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.outcome import boxed_letter


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.28}
    return rl("alphamed", TokenTerm(ppo_clip, kwargs=clip), metrics=clip,
              reward=Reward(fn=boxed_letter))
