"""SinKD: Sinkhorn distance between the student's and the teacher's distributions of a batch, beside KL and CE.

Paper: Cui et al. 2024 (COLING, SinKD); code 2018cx/SinKD, `loss.py`. The published batch is one of
classified sentences; here it is at most 256 supervised tokens of a micro-batch on each device, on the union of their
stored ids and a tail bucket. Transport does not know which token is which, so KL must stand beside it.
Constants: eps 0.1 and 20 iterations from the code; weights CE 1 and KL 0.1 from its T0 script. Sinkhorn's weight there
is 0.8 on 0.001 times the sum over the batch; ours is divided by the number of tokens, so 0.8 x 0.001 x 256 = 0.2.
Guesses: that token batch and its size, temperature 1 instead of 2 (a top-k tail cannot be tempered; run the teacher
beside the student, target="teacher/main", for 2), learning rate and lengths (as in `sft.py`).
Expected: a little above `kd.py` in the paper's GLUE tables; unknown for token batches.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/sinkd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.groups.sinkhorn import sinkhorn_kd
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.coupled import CoupledTerm
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW


def recipe() -> Recipe:
    return Recipe(name="sinkd", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"ce": Term(cross_entropy),
               "kl": Term(forward_kl, target="signals/topk64", weight=0.1),
               "sinkhorn": CoupledTerm(sinkhorn_kd, target="signals/topk64", weight=0.2, scope="device",
                                       kwargs={"temperature": 1.0, "eps": 0.1, "iterations": 20, "tokens": 256})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
