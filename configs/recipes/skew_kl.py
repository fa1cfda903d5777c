"""DistiLLM's loss: KL(teacher || mixture), with a tenth of the teacher in the mixture.

Paper: Ko et al. 2024 (2402.03898), skew KL. Their adaptive use of student outputs is not in this recipe.
Constants: alpha 0.1 and no cross-entropy term are theirs (`losses.py`, GPT-2 scripts: lr 5e-4, 20 epochs). A guess:
top-64 with a tail bucket, lr. `skew_reverse_kl` is the other direction.
Expected: steadier gradients than `kd.py` where the student all but excludes a token, so more where it is far off.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/skew_kl.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.divergences import skew_forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="skew_kl", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"skew": Term(loss=skew_forward_kl, target="signals/topk64", kwargs={"alpha": 0.1})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
