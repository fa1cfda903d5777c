"""SimPO: mean log-probs of right and wrong answers compared with a margin, without a reference.

Paper: Meng et al. 2024 (2405.14734), eq. 6.
Constants: beta 2, gamma 1 and learning rate 5e-7 are the best REDI found for reasoning traces (2505.24850); the paper's
own are beta 2 to 2.5 and gamma 0.5 to 1.6.
Guesses: 32 sequences of 16k tokens, at most 4 pairs of a question, 1000 updates.
Expected: `preference_accuracy` rises from that of the start; answers get shorter where long ones were more often wrong.
Before it: `distill-jax generate questions/ --out answers/ --teacher START --n 8 --keep all`.
Hardware, time: `distill-jax plan configs/recipes/simpo.py --on h200:8`.
"""

from configs.preference import compares, preference
from distill_jax.losses.tokens.preference import simpo
from distill_jax.recipe import Recipe


def recipe() -> Recipe:
    beta = 2.0
    return Recipe(name="simpo", stages=(preference(
        {"simpo": compares(simpo, beta=beta, gamma=1.0)}, metrics={"beta": beta}),))
