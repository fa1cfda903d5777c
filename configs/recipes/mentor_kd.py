"""Mentor-KD: a mentor of middle size learns the teacher's rationales, then teaches the student: text and soft labels.

Paper: Lee et al. 2024 (EMNLP; code 2hojae/mentor-kd). Three stages: the mentor is fine-tuned on the teacher's right
rationales; it answers the same questions, right answers are kept; the student trains on both with
(1 - lambda) CE + lambda KL(mentor || student) at temperature tau, over all tokens, without the factor tau^2.
Constants: theirs: lambda 0.3, tau 2 (their shell script; 1 in the code's default), 3 rationales a question of teacher
and mentor each, lr 2e-4, AdamW with weight decay 0.01, batch 8, 20 epochs. They choose the best epoch on the test set;
here the last one counts. `forward_kl` has the factor tau^2, so its weight is lambda / tau^2. A guess: sampling at 0.7,
the Qwen sizes, even shares of both stores, number of updates.
The mentor runs beside the student (full distributions: tau is exact, which a stored top-k with a tail cannot be).
Expected: a little better than `sft.py` on the teacher's rationales alone (the paper: about 2 points).
Before it: `distill-jax import` or `generate` writes the teacher's verified traces to `traces/`.
Hardware, time: `distill-jax plan configs/recipes/mentor_kd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Mix, Store
from distill_jax.decode.sampling import Sampling
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Frozen, Generate, Recipe, Saving, Stage, Student
from distill_jax.traces.ops.dedup import Dedup
from distill_jax.train.optim import AdamW

LAMBDA, TAU = 0.3, 2.0
OPTIM = AdamW(peak_lr=2e-4, weight_decay=0.01)


def store(path: str) -> Store:
    return Store(path=path, rows=8, seq_len=4096, verdict="correct", ops=(Dedup(),))


def recipe() -> Recipe:
    mentor = Student(model="Qwen/Qwen2.5-3B", precision="bfloat16", remat="dots")
    student = Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")
    return Recipe(name="mentor_kd", stages=(
        Stage(name="mentor", source=store("traces/"), providers={"student": mentor},
              terms={"ce": Term(loss=cross_entropy)}, optim=OPTIM, steps=4000, saving=Saving(steps=500)),
        Generate(name="rationales", teacher="stage:mentor", questions="traces/", n=3, keep="correct",
                 sampling=Sampling(temperature=0.7, max_new_tokens=2048)),
        Stage(name="student",
              source=Mix(sources=(store("traces/"), store("stage:rationales/store")), weights=(1.0, 1.0), rows=8),
              providers={"student": student, "mentor": Frozen("stage:mentor", precision="bfloat16")},
              terms={"ce": Term(loss=cross_entropy, weight=1 - LAMBDA),
                     "kl": Term(loss=forward_kl, target="mentor/main", weight=LAMBDA / TAU**2,
                                kwargs={"temperature": TAU})},
              optim=OPTIM, steps=8000, saving=Saving(steps=500))))
