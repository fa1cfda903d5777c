"""TAID: a target that moves from the student's own distribution to the teacher's as training allows.

Paper: Shing et al. 2025 (2501.16937) and the authors' code for the schedule. No cross-entropy term, as
there.
Constants: t from 0.4 (their Phi-3-mini -> TinyLlama; 0.2 for a weaker student), to 1, alpha 5e-4, beta 0.99 are theirs;
the linear ramp ends with the training. A guess: the top-k completion by one tail bucket (theirs has the whole teacher),
lr (theirs 1e-4, 5 epochs).
Expected: at least `kd.py`, more the larger the gap between teacher and student; `adaptive=False` is the ablation.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/taid.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.taid import taid
from distill_jax.objective.controllers import TAIDSchedule
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="taid", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"taid": Term(loss=taid, target="signals/topk64", kwargs={"t": TAIDSchedule(start=0.4)})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
