"""Distilling the Essence: KD on the thinking alone, of the first half of every row.

Paper: 2512.21002. Loss 0.5 CE + 0.5 tau^2 KL (tau = 1) on a chosen set of sections, sequences cut to their first half
("the first 50% of the tokens keeps about 94% of the performance at half the time and memory"). lr 4e-6, AdamW with
weight decay 0.05, warm-up 10%, at most 4,096 tokens, 8 sequences a batch, 2 epochs of 8,000 (Bespoke-Stratos) or 40,000
(OpenThoughts) traces; teacher Qwen3-8B, students Qwen3-4B-Base, 1.7B, 0.6B: theirs, from the authors' `training.sh`.
Sections are roles: theirs "cot" is on=(THINK,), "cotAns" (THINK, ANSWER), "promptcotAns" (QUESTION, THINK, ANSWER), the
last with a signal scored on the prompt as well. Their `cot` mask ends one token off; here `</think>` is thinking.
Constants: a guess: 5% of the questions stay whole (`whole`), because a student that only saw halves never saw an end.
The cut counts the prompt (of="row"); with prompts longer than the traces use of="written".
Expected: nearly the accuracy of whole rows at about half the cost of a step; `benchmarks/kept_fraction.py` measures
accuracy against the kept fraction in the generated world.
Before it: `distill-jax score traces/ --teacher Qwen/Qwen3-8B --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/essence.py --on h200:1`.
"""

from distill_jax.core.roles import THINK
from distill_jax.data.source_specs import Prefix, Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW

SECTION = (THINK,)


def recipe() -> Recipe:
    return Recipe(name="essence", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=8, seq_len=4096, holdout=0.02,
                     prefix=Prefix(share=0.5, of="row", whole=0.05)),
        providers={"student": Student(model="Qwen/Qwen3-0.6B", precision="bfloat16", remat="dots")},
        terms={"ce": Term(loss=cross_entropy, on=SECTION, weight=0.5),
               "kl": Term(loss=forward_kl, target="signals/topk64", on=SECTION, weight=0.5)},
        optim=AdamW(peak_lr=4e-6, warmup=0.1, weight_decay=0.05),
        steps=4000, saving=Saving(steps=500), heldout=256),))
