"""RLOO: REINFORCE with the mean reward of the other answers as baseline.

Paper: Ahmadian et al. 2024 (2402.14740).
Constants: No clip, no standard deviation; a sequence is one action, so its tokens are
summed (here divided by the longest answer, which only scales the rate).
Guesses: without their KL in the reward, for which `advantage=Penalised(reference="reference", beta=0.05)`,
`reference=True` and `equal="keep"` stand in `rl(...)`; 64 questions, 8 answers (theirs 2 and 4), learning rate
1e-6, 300 updates.
Expected: as `dr_grpo.py`, of which it is n / (n - 1) times the gradient.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/rloo.py --on h200:8` (without the sampling).
"""

from configs.rl import LONGEST, rl
from distill_jax.losses.tokens.aggregate import ConstantLength
from distill_jax.losses.tokens.policy import reinforce
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rollout.advantages import leave_one_out


def recipe() -> Recipe:
    return rl("rloo", TokenTerm(reinforce, per=ConstantLength(length=LONGEST)), advantage=leave_one_out)
