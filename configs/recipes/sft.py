"""SFT: cross-entropy on the teacher's thinking and answers (sequence-level KD without a signal).

Paper: none in particular; the baseline of every distillation paper (e.g. DeepSeek-R1, section 2.4: SFT on 800k traces).
Constants: lr 1e-5, cosine, warm-up 3%, 2 epochs' worth of steps are common practice for 0.5B to 7B students, not tuned.
Expected: the student writes the teacher's kind of thinking; compare `configs/recipes/kd.py` at equal steps.
Hardware, time: `distill-jax plan configs/recipes/sft.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="sft", stages=(Stage(
        source=Store(path="traces/", rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"ce": Term(loss=cross_entropy)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
