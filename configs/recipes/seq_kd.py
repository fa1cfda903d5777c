"""Sequence-level KD: the student is fine-tuned on what the teacher writes, and on nothing else.

Paper: Kim & Rush 2016 (1606.07947), section 3.2: the teacher's distribution over sequences is replaced by its mode,
found by beam search; greedy decoding stands for it here (there is no beam search). With n > 1 and a temperature the
same recipe is distillation on samples (R1-style), and keep="correct" is rejection sampling, which the paper lacks:
keep="all" is theirs.
Constants: a guess: all of them; lr as in `sft.py`.
Expected: above SFT on the same questions with reference answers where these are terse; below `kd.py`, which adds the
teacher's distribution over every token of the same text.
Before it: `questions/` is a store whose traces hold the questions (and gold answers, for keep="correct").
Hardware, time: `distill-jax plan configs/recipes/seq_kd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.decode.sampling import Sampling
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.objective.term import Term
from distill_jax.recipe import Generate, Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="seq_kd", stages=(
        Generate(name="traces", teacher="Qwen/Qwen2.5-7B-Instruct", questions="questions/", n=1, keep="all",
                 sampling=Sampling(temperature=0.0, max_new_tokens=2048)),
        Stage(name="student",
              source=Store(path="stage:traces/store", rows=64, seq_len=4096, holdout=0.02),
              providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
              terms={"ce": Term(loss=cross_entropy)}, optim=AdamW(peak_lr=1e-5, warmup=100),
              steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256)))
