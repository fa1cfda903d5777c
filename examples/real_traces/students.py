"""KD against cross-entropy alone: two students of half the teacher's width, equal steps, same data order and start.

KD: 0.9 forward KL to the stored top-64 signal (tail kept) + 0.1 cross-entropy. The weights are a guess (common
practice), not tuned. Expected: lower held-out cross-entropy with KD after equal steps.
"""

import dataclasses

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW
from examples.real_traces.models import qwen2


def recipe() -> Recipe:
    kd = Stage(
        name="kd",
        source=Store(path="SET_ME", signals=("topk64",), rows=8, seq_len=512, verdict="not_wrong", holdout=0.02),
        providers={"student": Student(config=qwen2(128, 4, 8000), tokenizer="SET_ME")},
        terms={"kl": Term(loss=forward_kl, target="signals/topk64", weight=0.9),
               "ce": Term(loss=cross_entropy, weight=0.1)},
        optim=AdamW(peak_lr=3e-3, warmup=50), steps=400, saving=Saving(steps=200), heldout=64)
    ce = dataclasses.replace(kd, name="ce", terms={"ce": Term(loss=cross_entropy)},
                             source=dataclasses.replace(kd.source, signals=()))
    return Recipe(name="real_students", stages=(kd, ce))
