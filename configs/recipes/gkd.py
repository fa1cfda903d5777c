"""GKD: a generalised Jensen-Shannon divergence to a live teacher, half of it on what the student writes itself.

Paper: Agarwal et al. 2024 (2306.13649), eq. 1 and algorithm 1; the gradient does not go through the sampling.
Constants: beta 0.5 (they study 0.1, 0.5, 0.9; 0 is forward KL, 1 reverse KL), lambda 0.5 (they study 0, 0.5, 1) and no
cross-entropy term are theirs, temperature 1 too. A guess: answers are at most 16 updates old (theirs are fresh), 512
questions a sampling, lr. Off-policy, lambda = 0: `--set on_policy=null`.
Expected: between `kd.py` and `on_policy_rkl.py` in how sharp the student becomes, and better than the same divergence
on stored traces alone where the student's own prefixes differ from the teacher's: long answers.
Before it: nothing but a store of questions; its traces are the other half.
Hardware, time: `distill-jax plan configs/recipes/gkd.py --on h200:1`, which counts no sampling.
"""

from distill_jax.data.source_specs import Store
from distill_jax.decode.sampling import Sampling
from distill_jax.losses.rows.divergences import generalized_jsd
from distill_jax.objective.term import Term
from distill_jax.recipe import Frozen, Recipe, Saving, Stage, Student
from distill_jax.rollout.on_policy import OnPolicy
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="gkd", stages=(Stage(
        source=Store(path="traces/", rows=64, seq_len=4096, holdout=0.02),
        on_policy=OnPolicy(share=0.5, every=16, prompts=512,
                           sampling=Sampling(temperature=1.0, max_new_tokens=2048)),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots"),
                   "teacher": Frozen("Qwen/Qwen2.5-7B-Instruct", precision="bfloat16")},
        terms={"jsd": Term(loss=generalized_jsd, target="teacher/main", kwargs={"beta": 0.5})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=4, saving=Saving(steps=500), heldout=256),))
