"""RS-KD: forward KL to outcomes drawn from the teacher, unbiased where renormalised top-k is not.

Paper: Anshumann et al. 2025, "Sparse Logit Sampling" (2503.16870). About 12 of 50 draws are distinct, and came within
0.01 of full-vocabulary KD there, where top-50 renormalised lost to plain cross-entropy.
Constants: 50 draws at temperature 1 are theirs. A guess: the 0.1 of cross-entropy beside it, lr (theirs is
pretraining).
Expected: held-out cross-entropy as `kd.py` with fewer bytes per token; the reported value of `kl` is too large by what
the draws lack of the teacher's entropy, its gradient is not.
Before it: `distill-jax score traces/ --teacher MODEL --signal sampled:50`.
Hardware, time: `distill-jax plan configs/recipes/rs_kd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="rs_kd", stages=(Stage(
        source=Store(path="traces/", signals=("sampled50",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"kl": Term(loss=forward_kl, target="signals/sampled50", weight=0.9),
               "ce": Term(loss=cross_entropy, weight=0.1)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
