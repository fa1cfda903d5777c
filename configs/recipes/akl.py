"""AKL: forward KL where the student misses the teacher's head, reverse KL where it misses its tail.

Paper: Wu et al. 2024 (2404.02657); mu = 0.5 is theirs.
Constants: mu; no cross-entropy term. A guess: top-64, whose bucket counts as tail, and lr.
Expected: in the paper a little better than forward or reverse KL and their mean after few epochs, alike after many.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/akl.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.adaptive import adaptive_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="akl", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"akl": Term(loss=adaptive_kl, target="signals/topk64", kwargs={"mu": 0.5})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
