"""A teacher on real traces with an 8k vocabulary: width 256, 4 layers, cross-entropy. Sizes and lr are guesses."""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW
from examples.real_traces.models import qwen2


def recipe() -> Recipe:
    return Recipe(name="real_teacher", stages=(Stage(
        source=Store(path="SET_ME", rows=8, seq_len=512, verdict="not_wrong", holdout=0.02),
        providers={"student": Student(config=qwen2(256, 4, 8000), tokenizer="SET_ME")},
        terms={"ce": Term(loss=cross_entropy)}, optim=AdamW(peak_lr=2e-3, warmup=50),
        steps=800, saving=Saving(steps=200), heldout=64),))
