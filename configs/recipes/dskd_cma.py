"""DSKD-CMA: dual-space KD whose two sides meet by cross-model attention, so that their tokens need not agree.

Paper: Zhang et al. 2024 (2406.17328); code songmzhang/DSKD, `dual_space_kd_with_cross_model_attention.py`.
A learned query of the student's token embeddings attends to the teacher's, which gives teacher states at the student's
positions (`cma.t2s`) and student states at the teacher's (`cma.s2t`). The student follows `cma.t2s` only where that has
the token right; a map from scratch is no teacher yet.
  loss = (1 - r) CE + r (CE(t2s) + KL(t2s || student) where right + KL(teacher || s2t)), r = kd_rate
Constants: from the authors' scripts (GPT-2 120M from Qwen1.5-1.8B, Dolly) r = 0.5, temperature 2, projector learning
rate 1e-3. As in `dskd.py` the weights of the divergences are r / temperature^2. States are divided by the root mean
square of each vector; the published code divides by one standard deviation of the padded batch. Guesses: the student's
learning rate, batch and length (as in `sft.py`), and the start of the maps.
Teacher and student have different tokenizers: the source renders every row a second time as the teacher reads it (view
`theirs`: its tokenizer, its chat template), with the same rows and segment numbers, and the teacher runs on that. Any
pair with chat templates will do: `--set teacher=MODEL --set student=MODEL`; with one tokenizer the two views are equal.
Expected: above `dskd.py` across tokenizers in the paper; not measured here. Keeps one [T, T] attention per row.
Hardware, time: `distill-jax plan configs/recipes/dskd_cma.py --on h200:1`.
"""

from distill_jax.data.source_specs import Retokenised, Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.dual_space import jsd_where_right
from distill_jax.objective.term import Term
from distill_jax.recipe import CrossModelAttention, Frozen, Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW

RATE, TEMPERATURE = 0.5, 2.0


def recipe() -> Recipe:
    divergence = {"kwargs": {"temperature": TEMPERATURE}, "weight": RATE / TEMPERATURE**2}
    return Recipe(name="dskd_cma", stages=(Stage(
        source=Store(path="traces/", rows=64, seq_len=2048, holdout=0.02),
        views={"theirs": Retokenised("teacher")},
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots"),
                   "teacher": Frozen("mistralai/Mistral-7B-Instruct-v0.3", precision="bfloat16"),
                   "cma": CrossModelAttention(teacher_view="theirs", optim=AdamW(peak_lr=1e-3, warmup=100))},
        terms={"ce": Term(cross_entropy, weight=1.0 - RATE),
               "t2s_ce": Term(cross_entropy, student="cma.t2s/main", weight=RATE),
               "t2s_kl": Term(jsd_where_right, target="cma.t2s/main", **divergence),
               "s2t_kl": Term(forward_kl, student="cma.s2t/theirs", target="teacher/theirs", **divergence)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=4, saving=Saving(steps=500), heldout=256),))
