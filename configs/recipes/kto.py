"""KTO: single answers, desirable or not, against a point of reference: no pairs are needed.

Paper: Ethayarajh et al. 2024 (2402.01306), eq. 8. z0 is the mean log ratio of answers that stand behind other questions
(`Singles(measure=True)` puts one beside each answer), over the global batch, one update behind.
Constants: beta 0.1, both weights 1; theirs: desirable x right answers / (undesirable x wrong ones) in [1, 4/3], for
which `distill-jax batch` prints the numbers and `--set terms.kto.kwargs.desirable=` sets the weight.
Guesses: learning rate 5e-7, 32 sequences of 16k tokens, at most 4 right and 4 wrong answers of a question, 1000
updates.
Expected: 0.5 at the first update; `chosen_reward` above `rejected_reward`, `z0` small.
Before it: `distill-jax generate questions/ --out answers/ --teacher START --n 8 --keep all`; `--n 1` will do.
Hardware, time: `distill-jax plan configs/recipes/kto.py --on h200:8`.
"""

from configs.preference import REFERENCE, compares, preference
from distill_jax.losses.tokens.measures import sequence_log_ratio
from distill_jax.losses.tokens.preference import kto
from distill_jax.objective.controllers import Watched
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.traces.pairing import Singles


def recipe() -> Recipe:
    beta = 0.1
    z0 = TokenTerm(sequence_log_ratio, target=REFERENCE, where="mismatched", per="sequence", weight=0.0)
    loss = compares(kto, target=REFERENCE, beta=beta, z0=Watched(watch="z0"), desirable=1.0, undesirable=1.0)
    return Recipe(name="kto", stages=(preference(
        {"kto": loss}, others={"z0": z0}, build=Singles(limit=4), metrics={"beta": beta, "pairs": False}),))
