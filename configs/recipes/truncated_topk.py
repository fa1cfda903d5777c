"""Top-k KD as it is usually done: twelve kept outcomes made to sum to 1. A baseline, to see its bias; use `kd.py`.

Paper: the "top-k" of 2503.16870, which finds it worse than plain cross-entropy for k up to 25.
Constants: k = 12 and no cross-entropy term, as in their comparison. A guess: lr.
Expected: a student that is too sure: held-out cross-entropy above `sft.py`, worse calibration than `rs_kd.py`.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:12`.
Hardware, time: `distill-jax plan configs/recipes/truncated_topk.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.truncated import truncated_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="truncated_topk", stages=(Stage(
        source=Store(path="traces/", signals=("topk12",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"kl": Term(loss=truncated_kl, target="signals/topk12")},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
