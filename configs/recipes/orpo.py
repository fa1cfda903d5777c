"""ORPO: the likelihood of the right answer, and the odds of it against the wrong one, in one stage without a reference.

Paper: Hong et al. 2024 (2403.07691), eqs. 6 and 7; ORPO-Distill (2509.25100): the teacher's right traces against the
student's own wrong ones.
Constants: lambda 1 and 8 answers to a question are ORPO-Distill's.
Guesses: learning rate 5e-6 (there is an SFT term), 32 sequences of 16k tokens, at most 4 pairs of a question, 1000
updates. The likelihood is a mean over the tokens of all chosen answers. Wrong answers are those of the store: nothing
refreshes them during the run (ORPO-Distill's phi is 0).
Expected: `likelihood` falls as in `sft.py`; `odds` starts near ln 2.
Before it: `distill-jax generate questions/ --out answers/ --teacher MODEL --n 8 --keep all`; for ORPO-Distill a store
with the traces of both models.
Hardware, time: `distill-jax plan configs/recipes/orpo.py --on h200:8`.
"""

from configs.preference import compares, preference
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.tokens.preference import odds_ratio
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe


def recipe() -> Recipe:
    return Recipe(name="orpo", stages=(preference(
        {"odds": compares(odds_ratio)}, others={"likelihood": Term(cross_entropy, where="chosen")}, lr=5e-6),))
