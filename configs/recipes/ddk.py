"""DDK: the domains that the student is furthest behind in are read most, measured again every 1,000 updates.

Paper: Liu et al. 2024 (2407.16154): gap = student's perplexity / teacher's on held-out rows of each domain, first
shares softmax(gap), then r <- alpha r exp(gap) / sum + (1 - alpha) / N ("factor smoothing"). Theirs: every 1,000
updates, alpha 0.5, 500 held-out samples a domain, lr 3e-5 to 3e-6 cosine with 1,000 updates of warm-up, KL at
temperature 1 beside cross-entropy; 10 domains, about 30,000 updates.
Constants: a guess: weight 0.2 of the KL (read from memory of the paper), the three domains here, 8 batches of 64 rows
a measurement.
Expected: better than fixed even shares where one domain is harder than the rest (the paper: 55.4 against 52.9 on
average for Qwen1.5-14B to 1.8B). With domains that the student finds equally hard the shares stay even.
Before it, for each store: `distill-jax score STORE --teacher MODEL --signal topk:64`, and again with `--signal token`.
The three stores may be one import each, or one corpus split by domain.
Hardware, time: `distill-jax plan configs/recipes/ddk.py --on h200:1`.
"""

from distill_jax.data.source_specs import DomainGap, Mix, Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW

DOMAINS = ("math", "code", "science")


def recipe() -> Recipe:
    stores = tuple(Store(path=f"traces/{d}/", signals=("topk64", "token"), seq_len=4096, holdout=0.02) for d in DOMAINS)
    return Recipe(name="ddk", stages=(Stage(
        source=Mix(sources=stores, weights=(1.0,) * len(DOMAINS), rows=64,
                   controller=DomainGap(every=1000, alpha=0.5, teacher="token", batches=8)),
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots")},
        terms={"ce": Term(loss=cross_entropy),
               "kl": Term(loss=forward_kl, target="signals/topk64", weight=0.2)},
        optim=AdamW(peak_lr=3e-5, warmup=1000),
        steps=30_000, micro_batches=2, saving=Saving(steps=1000)),))
