"""What the preference recipes share: a distilled student, a store of judged answers, and what is watched."""

from collections.abc import Mapping
from typing import Any

from distill_jax.data.source_specs import Pairs
from distill_jax.objective.term import AnyTerm
from distill_jax.objective.tokens import TokenTerm, preference_metrics
from distill_jax.recipe import Frozen, Saving, Stage, Student
from distill_jax.traces.pairing import Builder, RightWrong
from distill_jax.train.optim import AdamW

STUDENT = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
REFERENCE = "reference/main"
ROWS, LENGTH = 32, 16384
"""Sequences of a batch, and their tokens: both sides of a pair are in one."""
PAIRS = RightWrong(limit=4)


def preference(loss: Mapping[str, TokenTerm], *, others: Mapping[str, AnyTerm] | None = None,
               build: Builder = PAIRS, metrics: Mapping[str, Any] | None = None, lr: float = 5e-7,
               steps: int = 1000, name: str = "train", student: str = STUDENT, decay: float = 0.0) -> Stage:
    """One stage on the pairs of `answers/`, a trace store with several judged answers to a question.

    others   further terms
    metrics  settings of `preference_metrics`, but for the target, which is that of `loss`
    What `loss` compares with is its target: "reference/main", for which the start of the student stays on the mesh, or
    "signals/<name>", what `distill-jax score answers/ --teacher START --signal token` wrote; or nothing.
    """
    target = next(iter(loss.values())).target
    stored = (target.removeprefix("signals/"),) if target.startswith("signals/") else ()
    providers = {"student": Student(model=student, precision="bfloat16", remat="full")}
    if target == REFERENCE:
        providers["reference"] = Frozen(student, precision="bfloat16")
    return Stage(
        name=name, source=Pairs(path="answers/", build=build, rows=ROWS, seq_len=LENGTH, holdout=0.02, signals=stored),
        providers=providers,
        terms={**loss, **(others or {}), **preference_metrics(target=target, **(metrics or {}))},
        optim=AdamW(peak_lr=lr, warmup=50, weight_decay=decay), steps=steps, micro_batches=ROWS // 8,
        saving=Saving(steps=200), heldout=64)


def compares(loss: Any, *, target: str = "tokens", where: str = "pair_ids", **kwargs: Any) -> TokenTerm:
    """A preference loss as a term: the mean over pairs."""
    return TokenTerm(loss, target=target, where=where, per="sequence", kwargs=kwargs)
