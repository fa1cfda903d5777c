"""KD: forward KL to the stored teacher signal (top-k and a tail bucket) with a little cross-entropy.

Paper: Hinton et al. 2015, eq. 4, at temperature 1, on thinking and answer tokens; the tail bucket instead of
renormalising over k follows 2503.16870 (sparse logit sampling), section 3: renormalised top-k is biased.
Constants: weight 0.9 on the KL and 0.1 on cross-entropy is a guess (common practice); k = 64; lr as in `sft.py`.
Expected: lower held-out cross-entropy than `sft.py` after equal steps, most at the start.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/kd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="kd", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"kl": Term(loss=forward_kl, target="signals/topk64", weight=0.9),
               "ce": Term(loss=cross_entropy, weight=0.1)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
