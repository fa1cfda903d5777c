"""Quickstart: the main job in a generated world, on a laptop CPU, in about ten minutes.

A shared base learns to look things up; from it a teacher learns two-hop questions over 2 to 8 documents with thinking;
the teacher answers 8,000 questions, its right answers are kept and scored; from the same base one student learns
thinking and answers from the store (KD), another the answers alone: the same questions, the same number of updates.

Paper: 2507.14849 asks whether distilled reasoning helps reading several documents, and with less position bias. It
publishes none of its settings, so the protocol is ours (docs/METHODS.md). Sizes, learning rates and step counts are
guesses, and not good ones yet: on seed 0 the base does not learn to look up within its steps, and all models stay at
chance at 8 documents (docs/LOG.md).
Goal, not reached: at 8 documents thinking >= 80%, at least 25 points above answers alone.
"""

from distill_jax.data.sources import Store
from distill_jax.decode.sampling import Sampling
from distill_jax.jobs.quickstart import build_world, report
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.objective.term import Term
from distill_jax.recipe import Call, Generate, Recipe, Saving, Score, Stage, Student
from distill_jax.traces.ops.strip_thinking import StripThinking
from distill_jax.train.optim import AdamW

MODEL = ModelConfig(
    vocab_size=176, hidden_size=96, mlp_size=256, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=24,
    context_length=128, attention=AttentionConfig(qkv_bias=True))
BASE_STEPS, STEPS = 1800, 1200
ROWS = 32
CE = {"ce": Term(loss=cross_entropy)}
OPTIM = AdamW(peak_lr=1.5e-3, warmup=50, b2=0.98)
SAVING = Saving(steps=300, keep=1)


def store(path: str, **kwargs: object) -> Store:
    return Store(path=path, rows=ROWS, seq_len=64, pack=False, **kwargs)  # type: ignore[arg-type]


def train(name: str, source: Store, model: str, terms: dict[str, Term]) -> Stage:
    return Stage(name=name, source=source, providers={"student": Student(model=model)}, terms=terms, optim=OPTIM,
                 steps=STEPS, saving=SAVING, log_every=100)


def recipe() -> Recipe:
    base = Stage(name="base", source=store("stage:world/base"), terms=CE, optim=OPTIM, steps=BASE_STEPS, saving=SAVING,
                 log_every=100, providers={"student": Student(config=MODEL, tokenizer="stage:world/tokenizer")})
    kd = {"ce": Term(loss=cross_entropy, weight=0.5), "kl": Term(loss=forward_kl, target="signals/topk8", weight=0.5)}
    return Recipe(name="quickstart", stages=(
        Call(name="world", fn=build_world, kwargs={"base_rows": 24000, "teacher_rows": 24000, "questions": 8000}),
        base,
        train("teacher", store("stage:world/teacher"), "stage:base", CE),
        Generate(name="traces", teacher="stage:teacher", questions="stage:world/questions", batch_size=512,
                 sampling=Sampling(temperature=0.7, max_new_tokens=24)),
        Score(name="score", store="stage:traces/store", teacher="stage:teacher", signal="topk:8"),
        train("thinking", store("stage:traces/store", signals=("topk8",)), "stage:base", kd),
        train("answer_only", store("stage:traces/store", ops=(StripThinking(),)), "stage:base", CE),
        Call(name="report", fn=report, kwargs={"teacher": "stage:teacher", "thinking": "stage:thinking",
                                               "answer_only": "stage:answer_only"}),
    ))
