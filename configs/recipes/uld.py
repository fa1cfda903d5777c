"""ULD: a teacher with another tokenizer, compared by rank (Universal Logit Distillation), beside cross-entropy.

Paper: Boizard et al. 2024 (2402.12030).
Constants: cross-entropy + 1.5 ULD, temperatures 1 (their code's distil_factor).
What differs: the paper pairs position t of both tokenisations and cuts the longer one, so that the pairs drift apart
along the answer; here a position is compared where both have read the same bytes (`data/cross.py`). Ranks beyond k = 64
are compared as one tail (a lower bound of the full loss); k is a guess, and so are the learning rate and the steps.
Expected: a little below `sft.py` in held-out cross-entropy after equal steps; ranks say how sure to be, not of what.
`hybrid_uld.py` and `kd.py` on a signal scored with `--across prefix` say more where the vocabularies overlap.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`, the teacher being of any tokenizer that keeps
the text (T5's does not).
Hardware, time: `distill-jax plan configs/recipes/uld.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.uld import uld
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="uld", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"uld": Term(loss=uld, target="signals/topk64", weight=1.5),
               "ce": Term(loss=cross_entropy)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
