"""KD into a sparse mixture: `kd.py` with Qwen3-30B-A3B as the student, experts spread over the `expert` axis.

Paper: Hinton et al. 2015, eq. 4, as in `kd.py`; the model is 2505.09388, the router's balance loss Switch (2101.03961),
equations 4 to 6, over all layers and the whole batch.
Constants: weights and learning rate as in `kd.py`; the balance loss has the published router_aux_loss_coef, 0.001 (a
field of the model's config.json). The mesh (64 devices) is a guess.
Expected: not run yet. `experts/load` (busiest expert over the mean) should not grow.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/kd_moe.py --on h200:64` (`configs/models/qwen3_30b_a3b.py` where there
is no network).
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import MeshShape, Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="kd_moe", mesh=MeshShape(fsdp=8, expert=8), stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=128, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen3-30B-A3B", precision="bfloat16", remat="full")},
        terms={"kl": Term(loss=forward_kl, target="signals/topk64", weight=0.9),
               "ce": Term(loss=cross_entropy, weight=0.1)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
