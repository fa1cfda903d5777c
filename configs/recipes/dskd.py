"""DSKD: student and teacher compared in both hidden spaces, each with one head for both (same tokenizer).

Paper: Zhang et al. 2024 (2406.17328); code songmzhang/DSKD, `dual_space_kd.py`.
Two learned maps: `t2s` brings the teacher's last states into the student's space, where the student's head (a constant
there) reads them; it learns by cross-entropy on the tokens, and the student follows its distribution. `s2t` brings the
student's states into the teacher's space.
  loss = (1 - r) CE + r (CE(t2s) + KL(t2s || student) + KL(teacher || s2t)), r = kd_rate
Constants: from the authors' scripts (GPT-2 120M, Dolly) r = 0.5, temperature 2 on both divergences, projector learning
rate 1e-3 (the student's there is 5e-4). Their divergences are not multiplied by temperature^2 and ours are, hence
the weights r / 4. D is forward KL, the first of the five they compare. Guesses: the student's learning rate (as in
`sft.py`), its batch and length, and that the maps start from a normal kernel of variance 1 / width.
Expected: better than `kd.py` with a live teacher, as in the paper; not measured here.
Runs the teacher beside the student, in every step: no signal is read.
Hardware, time: `distill-jax plan configs/recipes/dskd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Frozen, Projector, Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW

RATE, TEMPERATURE = 0.5, 2.0


def recipe() -> Recipe:
    divergence = {"kwargs": {"temperature": TEMPERATURE}, "weight": RATE / TEMPERATURE**2}
    projector = AdamW(peak_lr=1e-3, warmup=100)
    return Recipe(name="dskd", stages=(Stage(
        source=Store(path="traces/", rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots"),
                   "teacher": Frozen("Qwen/Qwen2.5-7B", precision="bfloat16"),
                   "t2s": Projector(reads="teacher", like="student", optim=projector),
                   "s2t": Projector(reads="student", like="teacher", optim=projector)},
        terms={"ce": Term(cross_entropy, weight=1.0 - RATE),
               "t2s_ce": Term(cross_entropy, student="t2s/main", weight=RATE),
               "t2s_kl": Term(forward_kl, target="t2s/main", **divergence),
               "s2t_kl": Term(forward_kl, student="s2t/main", target="teacher/main", **divergence)},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=4, saving=Saving(steps=500), heldout=256),))
