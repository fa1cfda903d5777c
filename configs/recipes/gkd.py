"""GKD, off-policy part: a generalised Jensen-Shannon divergence on stored traces.

Paper: Agarwal et al. 2024 (2306.13649), eq. 1, with lambda = 0 (no student outputs). Their on-policy share needs
rollouts and is not in this recipe.
Constants: beta 0.5 (they study 0.1, 0.5, 0.9; 0 is forward KL, 1 reverse KL), no cross-entropy term, are theirs. A
guess: top-64 and a tail bucket for the whole teacher (a lower bound of its divergence), lr.
Expected: between `kd.py` and `minillm_reverse_kl.py` in how sharp the student becomes.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/gkd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.divergences import generalized_jsd
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="gkd", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"jsd": Term(loss=generalized_jsd, target="signals/topk64", kwargs={"beta": 0.5})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
