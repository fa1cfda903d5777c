"""On-policy distillation: KL(student || teacher) at every token of what the student writes, the teacher live.

Paper: GKD (2306.13649) with beta = 1 and lambda = 1; the per-token part of MiniLLM's sequence objective (2306.08543,
eq. 1), whose long-term part (the reward-to-go of later tokens) is left out, as it is there for lambda = 1.
Constants: the reverse KL, temperature 1 and lambda 1 are theirs. A guess: answers are at most 8 updates old, 512
questions a sampling, lr.
Expected: from a student that has learned the format (`sft.py` or `kd.py` first: `--set student=RUN`), better answers
at temperature 0 than more updates on stored traces, and less variety. From a student that writes noise it learns
little: the teacher's opinion of noise is all it sees.
Before it: a store of questions; nothing of what is answered in it is read.
Hardware, time: `distill-jax plan configs/recipes/on_policy_rkl.py --on h200:1`, which counts no sampling.
"""

from distill_jax.data.source_specs import Store
from distill_jax.decode.sampling import Sampling
from distill_jax.losses.rows.divergences import reverse_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Frozen, Recipe, Saving, Stage, Student
from distill_jax.rollout.on_policy import OnPolicy
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="on_policy_rkl", stages=(Stage(
        source=Store(path="traces/", rows=64, seq_len=4096, holdout=0.02),
        on_policy=OnPolicy(every=8, prompts=512, sampling=Sampling(temperature=1.0, max_new_tokens=2048)),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots"),
                   "teacher": Frozen("Qwen/Qwen2.5-7B-Instruct", precision="bfloat16")},
        terms={"kl": Term(loss=reverse_kl, target="teacher/main")},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=1000, micro_batches=4, saving=Saving(steps=200), heldout=256),))
