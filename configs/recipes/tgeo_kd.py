"""TGeo-KD: how far each token trusts the teacher is learned, so that held-out rows are predicted better.

Paper: Hu et al. 2024 (2312.15112), the inner loss alpha KD + (1 - alpha) CE with alpha = sigmoid(MLP(triangle)), and
the bilevel problem over the MLP; written for classifiers. No code was published.
Constants: a two-layer network is theirs. A guess: scalar sides and entropies as its input in place of vectors over the
vocabulary, and no inter-sample triangle (class means have no counterpart here); 64 units; one unrolled plain gradient
step of 1e-3 every 10 updates, by a central difference (DARTS); AdamW 1e-3 for the network; alpha starts at 1/2;
top-64 with a tail bucket; lr.
Expected: alpha (`ratio/think`, `ratio/answer` in the metrics) rises where the teacher is right and the student far from
it, and falls where the teacher is wrong, as in their figure; held-out cross-entropy at most that of `kd.py`.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/tgeo_kd.py --on h200:1`; the network's updates add two gradients and
three forward passes every 10 updates.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.trilateral import Fused, fusion_ratio
from distill_jax.objective.controllers import FusionNet
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW

NET = FusionNet(width=64, every=10, inner_lr=1e-3, lr=1e-3)


def recipe() -> Recipe:
    return Recipe(name="tgeo_kd", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"fused": Term(loss=Fused(kd=forward_kl), target="signals/topk64", kwargs={"fusion": NET}),
               "ratio": Term(loss=fusion_ratio, target="signals/topk64", weight=0.0, kwargs={"fusion": NET})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
