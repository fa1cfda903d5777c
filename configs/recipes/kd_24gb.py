"""KD of a 1.5B student on one card of 24 GB: the terms of `kd.py`, with adapters on the frozen bfloat16 model.

Paper: LoRA, Hu et al. 2022 (2106.09685), section 4.1, equation 3; the terms as in `kd.py`.
Constants: rank 16, alpha 32 and all seven projections are common practice (the paper adapts q and v only); lr 1e-4 is
ten times that of `kd.py`, as usual for adapters: a guess. Two rows a micro-batch: activations stay small.
Expected: somewhat behind `kd.py` at equal updates. Not run at this size yet.
All parameters instead: `--set student.lora=null --set optim.peak_lr=1e-5 --set optim.state=int8 --set micro_batches=16
--set student.remat=full` keeps float32 masters and takes about 22 GB: tight, no room for longer rows.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/kd_24gb.py --on rtx4090`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.models.lora import Lora
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="kd_24gb", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=16, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-1.5B", precision="bfloat16", remat="qkv_attention",
                                      lora=Lora(rank=16, alpha=32.0))},
        terms={"kl": Term(loss=forward_kl, target="signals/topk64", weight=0.9),
               "ce": Term(loss=cross_entropy, weight=0.1)},
        optim=AdamW(peak_lr=1e-4, warmup=100),
        steps=4000, micro_batches=8, saving=Saving(steps=500), heldout=256),))
