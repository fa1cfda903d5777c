"""Selective KD: forward KL only on the fifth of the tokens where the student is most uncertain (SE-KD).

Paper: Tavor et al. 2026 (2602.01395): positions with the highest student entropy, top 20%, no cross-entropy (the
authors' commands: k_percent 20, alpha_ce 0). They rank the positions of a batch; here a threshold follows the 80%
quantile from step to step, so that the gradient does not depend on micro-batches (`losses/rows/selective.py`).
Constants: share 0.2 of the paper; rate 0.2 of the quantile rule from Andrew et al. 2021 (1905.03871), made for gradient
norms: a guess here, as is the first threshold of 1 nat; lr as in `sft.py`.
Expected: about the quality of `kd.py` with the KL on all tokens (the paper: +0.4 points of accuracy, perplexity 6.9
against 7.3). The cost of a step is that of `kd.py`: the student's logits are needed to know its entropy.
Before it: `distill-jax score traces/ --teacher MODEL --signal topk:64`.
Hardware, time: `distill-jax plan configs/recipes/selective_kd.py --on h200:1`.
"""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.selective import Selective, uncertain
from distill_jax.objective.controllers import EntropyQuantile
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW

SHARE = 0.2
THRESHOLD = EntropyQuantile(share=SHARE, watch="uncertain")


def recipe() -> Recipe:
    return Recipe(name="selective_kd", stages=(Stage(
        source=Store(path="traces/", signals=("topk64",), rows=64, seq_len=4096, holdout=0.02),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"kl": Term(loss=Selective(loss=forward_kl, share=SHARE), target="signals/topk64",
                          kwargs={"threshold": THRESHOLD}),
               "uncertain": Term(loss=uncertain, target="signals/topk64", weight=0.0,
                                 kwargs={"threshold": THRESHOLD})},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=2, saving=Saving(steps=500), heldout=256),))
