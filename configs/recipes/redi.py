"""REDI: first the right answers, then right against wrong ones by a loss without reference and sigmoid.

Paper: Reinforcement Distillation (2505.24850), eq. 3; the authors' code.
Constants: alpha 0.8, learning rate 1e-6, weight decay 1e-4, 32 pairs a batch and one epoch in the second stage; 5
epochs of the right answers in the first; their answers have up to 19,000 tokens.
Guesses: the first stage's learning rate 1e-5; sequences of 40,960 tokens, which hold one such pair; updates for 78k
right answers and 53k pairs, their numbers. The base: theirs is Qwen2.5-Math-1.5B with rope_theta 300000 and a context
of 32k, which its published configuration does not have.
Expected: `redi` falls without bound: what counts is that `chosen_logprob` does not fall with `rejected_logprob`.
Theirs: MATH-500 80.4 after the first stage, 83.1 after the second.
Before it: `distill-jax import` of a data set with right and wrong traces of a question into `answers/`, or
`distill-jax generate questions/ --out answers/ --teacher MODEL --n 4 --keep all`.
Hardware, time: `distill-jax plan configs/recipes/redi.py --on h200:8`.
"""

from dataclasses import replace

from configs.preference import compares, preference
from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.tokens.preference import redi
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Stage, Student
from distill_jax.traces.pairing import RightWrong
from distill_jax.train.optim import AdamW

START = "Qwen/Qwen2.5-1.5B"
LENGTH = 40960


def recipe() -> Recipe:
    first = Stage(
        name="sft", source=Store(path="answers/", verdict="correct", rows=64, seq_len=LENGTH, holdout=0.02),
        providers={"student": Student(model=START, precision="bfloat16", remat="full")},
        terms={"likelihood": Term(cross_entropy)}, optim=AdamW(peak_lr=1e-5, warmup=100), steps=3000,
        micro_batches=8, heldout=64)
    second = preference({"redi": compares(redi, alpha=0.8)}, build=RightWrong(limit=1), name="redi",
                        student="stage:sft", lr=1e-6, decay=1e-4, steps=1650)
    source = replace(second.source, seq_len=LENGTH, pack=False)
    return Recipe(name="redi", stages=(first, replace(second, source=source)))
