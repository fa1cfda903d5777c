"""RAFT: the likelihood of right answers alone, sampled anew every round.

Paper: Xiong et al. 2025 (2504.11343); Dong et al. 2023 (2304.06767).
Constants: Reward 1 or 0, no baseline: wrong answers have no
gradient. One update a round, so no ratio is needed (RAFT++ adds one).
Guesses: 64 questions, 8 answers, learning rate 1e-6, 300 updates.
Expected: fast at first, below `grpo.py` at the end: the entropy falls.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/raft.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import reinforce
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rollout.advantages import positive_only


def recipe() -> Recipe:
    return rl("raft", TokenTerm(reinforce), advantage=positive_only, equal="keep")
