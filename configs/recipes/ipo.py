"""IPO: the log-ratio margin of a pair is drawn to a fixed value, so that it does not grow without end.

Paper: Azar et al. 2023 (2310.12036), eq. 17, on means over tokens as its authors run it.
Constants: a guess all of them: beta (their tau) 0.1, which draws the margin to 5 nats a token; learning rate 5e-7, 32
sequences of 16k tokens, at most 4 pairs of a question, 1000 updates.
Expected: 1 / (2 beta)^2 = 25 at the first update; less drift than `dpo.py` where labels are noiseless.
Before it: `distill-jax generate questions/ --out answers/ --teacher START --n 8 --keep all`.
Hardware, time: `distill-jax plan configs/recipes/ipo.py --on h200:8`.
"""

from configs.preference import REFERENCE, compares, preference
from distill_jax.losses.tokens.preference import ipo
from distill_jax.recipe import Recipe


def recipe() -> Recipe:
    beta = 0.1
    return Recipe(name="ipo", stages=(preference(
        {"ipo": compares(ipo, target=REFERENCE, beta=beta)}, metrics={"beta": beta, "average": True}),))
