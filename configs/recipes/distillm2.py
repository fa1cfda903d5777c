"""DistiLLM-2: skew KL on the teacher's responses, skew reverse KL on the student's, in one batch.

Paper: Ko et al. 2025 (2503.07067). Which rows a term is taken on is decided by the signal they carry: each store has
its own.
Constants: alpha 0.1 and equal weights are theirs before adaptation; their per-sample alpha and growing weight of the
second term are not in this recipe. A guess: top-64 with a tail bucket, lr, responses made once before training.
Expected: more than `skew_kl.py` with the same teacher rows; the student term lowers what the student says and the
teacher would not.
Before it: `distill-jax generate` with the student into student_traces/, then `distill-jax score` of both stores with
the teacher: `traces/ --signal topk:64 --name teacher64` and `student_traces/ --signal topk:64 --name student64`.
Hardware, time: `distill-jax plan configs/recipes/distillm2.py --on h200:1`.
"""

from distill_jax.data.source_specs import Mix, Store
from distill_jax.losses.rows.divergences import skew_forward_kl, skew_reverse_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="distillm2", stages=(Stage(
        source=Mix(
            sources=(Store(path="traces/", signals=("teacher64",), seq_len=4096, holdout=0.02),
                     Store(path="student_traces/", signals=("student64",), seq_len=4096, holdout=0.02)),
            weights=(0.5, 0.5), rows=64),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"skl": Term(loss=skew_forward_kl, target="signals/teacher64", weight=0.5, kwargs={"alpha": 0.1}),
               "srkl": Term(loss=skew_reverse_kl, target="signals/student64", weight=0.5, kwargs={"alpha": 0.1})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
