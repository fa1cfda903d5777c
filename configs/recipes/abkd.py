"""ABKD: an alpha-beta divergence, between forward and reverse KL in two ways at once.

Paper: Wang et al. 2025 (2505.04560), the divergence of Cichocki et al. 2011.
Constants: alpha 0.2, beta 0.7 are the defaults of a third-party copy of the authors' loss, not read in the paper: treat
them as a guess. So are top-64 with a tail bucket, and lr.
Expected: sharper than `kd.py`, less so than `minillm_reverse_kl.py`. alpha + beta = 1 keeps the bound on the whole
teacher.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/abkd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.alpha_beta import alpha_beta
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="abkd", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"ab": Term(loss=alpha_beta, target="signals/topk64", kwargs={"alpha": 0.2, "beta": 0.7})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
