"""Hybrid ULD (GOLD, offline): by id where both vocabularies have the token, by rank where only the teacher has it.

Paper: none; Patino et al. 2025 (GOLD, "Unlocking on-policy distillation for any model family") and TRL's
`GOLDTrainer`: generalised JSD with beta 0.5 on the matched ids, ULD on the others.
Constants: TRL weighs the two by the share of the teacher's vocabulary that is matched and leaves cross-entropy out; the
weights 1 and 1 here, and 0.1 of cross-entropy, which the tokens inside a group need because no distribution reaches
them, are guesses. GOLD trains on the student's own samples; this recipe reads stored traces.
What differs: groups by bytes instead of merged distributions (TRL multiplies the first token's distribution by the
likelihood of the rest, which is no distribution any more); one bucket for all mass beside the matched ids, so that the
first part stays a divergence. k, learning rate and steps are guesses.
Expected: below `uld.py`, most where the vocabularies overlap (GPT-2 to Qwen2.5: 84% of the learned tokens).
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64` (`--across match`, the default).
Hardware, time: `distill-jax plan configs/recipes/hybrid_uld.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.uld import hybrid_uld
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="hybrid_uld", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"hybrid": Term(loss=hybrid_uld, target="signals/topk64", kwargs={"beta": 0.5}),
               "ce": Term(loss=cross_entropy, weight=0.1)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
