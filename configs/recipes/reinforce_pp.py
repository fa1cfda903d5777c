"""REINFORCE++: returns normalised over the whole batch, KL to the start in the reward of each token; no critic.

Paper: Hu 2025 (2501.03262); as RedStar (2501.11284) may use it.
Constants: A token's return is the answer's reward less beta times the k1 estimates of the KL from it on; clip 0.2; no
discount; beta 0.01 (a proposal of ours for RedStar's recipe, like the learning rate 5e-7).
Guesses: 64 questions, 8 answers, one update a round, 300 updates.
Expected: as `grpo.py`; questions whose answers are all right or all wrong still teach.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/reinforce_pp.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rollout.estimators import ReinforcePlusPlus


def recipe() -> Recipe:
    return rl("reinforce_pp", TokenTerm(ppo_clip), reference=True, lr=5e-7, equal="keep",
              advantage=ReinforcePlusPlus(reference="reference", beta=0.01))
