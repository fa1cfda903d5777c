"""DPO: right answers against wrong ones to the same question, by their log ratios to where the student started.

Paper: Rafailov et al. 2023 (2305.18290), eq. 7. f-DPO: Wang et al. 2023 (2309.16240); wrong labels: Mitchell 2023; a
common beginning left out: Marco-o1 v2 (2503.01461).
Constants: beta 0.1 (their default). Long reasoning wants less: REDI's best DPO has beta 0.001 and learning rate 2e-7.
Guesses: learning rate 5e-7, 32 sequences of 16k tokens, at most 4 pairs of a question, 1000 updates.
Variants: `--set terms.dpo.kwargs.divergence=js` (or forward_kl, alpha with `kwargs.alpha`), `--set
terms.dpo.kwargs.label_smoothing=0.1`, `--set terms.dpo.where=apart` (a common beginning counts in neither answer).
Stored reference, no second model on the mesh: `distill-jax score answers/ --teacher START --signal token`, and a copy
of this file with target="signals/token".
Expected: ln 2 at the first update, then a growing `reward_margin` and `preference_accuracy`. Watch `chosen_logprob`:
both sides' may fall, which is where answers without an end come from.
Before it: `distill-jax generate questions/ --out answers/ --teacher START --n 8 --keep all`.
Hardware, time: `distill-jax plan configs/recipes/dpo.py --on h200:8`.
"""

from configs.preference import REFERENCE, compares, preference
from distill_jax.losses.tokens.preference import dpo
from distill_jax.recipe import Recipe


def recipe() -> Recipe:
    beta = 0.1
    loss = compares(dpo, target=REFERENCE, beta=beta, divergence="reverse_kl", alpha=0.5, label_smoothing=0.0)
    return Recipe(name="dpo", stages=(preference({"dpo": loss}, metrics={"beta": beta}),))
