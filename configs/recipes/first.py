"""FIRST: the teacher's five most probable outcomes, re-calibrated, renormalised, and nothing else.

Paper: Shu et al. 2024 (2408.12168). k = 5 (about 95% of the mass, section 3) and the KL over the renormalised five are
theirs, and so is choosing the temperature by calibration error on held-out data (their preferred of two ways; the other
is how="smoothing"). lr 2e-6, 3 epochs, cosine, warm-up 3% from the authors' `distill.py`. Where their code and text
differ (smoothing of log values, KL of probabilities), this follows the text (`losses/rows/first.py`).
Constants: k, lr, warm-up: theirs. A guess: the temperature grid (0.5 to 3), 15 bins, 2% held out, steps.
The held-out error is taken against the tokens of the store: use reference answers. On traces that the teacher sampled
itself at temperature 1 it is calibrated by construction and the search finds T = 1.
Expected: better calibrated than `kd.py` (the paper: 10% less mis-calibration). The student's mass outside the five is
free: expect worse held-out cross-entropy than with the tail bucket (2503.16870). Add a cross-entropy term against that.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/first.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.jobs.recalibrate import recalibrate
from distill_jax.losses.rows.first import renormalised_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Call, Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="first", stages=(
        Call(name="recalibrate", fn=recalibrate,
             kwargs={"store": "traces/", "signal": "topk64", "name": "first5", "k": 5, "holdout": 0.02}),
        Stage(source=Store(path="traces/", signals=("first5",), rows=64, seq_len=4096, holdout=0.02),
              providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
              terms={"kl": Term(loss=renormalised_kl, target="signals/first5", kwargs={"k": 5})},
              optim=AdamW(peak_lr=2e-6, warmup=0.03),
              steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256)))
