"""PLD: the student's logits must rank the trace's token first and the others as the teacher does.

Paper: Plackett-Luce distillation (2506.12542), for images; the transfer to language models is ours. One loss, no
cross-entropy beside it.
Constants: temperature 1 (the paper studies 1 and 4; it tempers the teacher's weights alone). A guess: top-64 with the
bucket ranked last, the weight of a token that is not among them (`losses/rows/plackett_luce.py`), lr.
Expected: a larger margin of the trace's token than with `kd.py`, and worse calibration: it is not zero at the teacher.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/pld.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.plackett_luce import plackett_luce
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="pld", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"pld": Term(loss=plackett_luce, target="signals/topk64")},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
