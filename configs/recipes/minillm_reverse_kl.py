"""MiniLLM's objective, per token and off-policy: KL(student || teacher) on stored traces.

Paper: Gu et al. 2024 (2306.08543), eq. 1. Theirs is the reverse KL of whole sequences, by policy gradient on the
student's own outputs with a language-modelling loss beside it; this is its single-step part on the teacher's traces,
nothing more.
Constants: a guess all of them: 0.9 and 0.1, top-64 with a tail bucket, lr.
Expected: a sharper student than `kd.py`: better answers at temperature 0, less variety and worse held-out
cross-entropy.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/minillm_reverse_kl.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import reverse_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="minillm_reverse_kl", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"kl": Term(loss=reverse_kl, target="signals/topk64", weight=0.9),
               "ce": Term(loss=cross_entropy, weight=0.1)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
