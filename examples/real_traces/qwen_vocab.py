"""50 steps of a random Qwen2-architecture student at the real Qwen2.5 vocabulary (head padded to 151,936).

What it shows: the import, the store, packing and the lifted loss at a real vocabulary, on a laptop. 50 steps teach
the student little beyond the frequencies of tokens. Size and lr are guesses that fit two CPU cores.
"""

from distill_jax.data.source_specs import Mix, Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.objective.term import Term
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW
from examples.real_traces.models import qwen2


def recipe() -> Recipe:
    return Recipe(name="real_qwen_vocab", stages=(Stage(
        source=Mix(sources=(Store(path="SET_ME", seq_len=512, verdict="not_wrong"),
                            Store(path="SET_ME", seq_len=512, verdict="not_wrong")), weights=(0.8, 0.2), rows=4),
        providers={"student": Student(config=qwen2(64, 2, 151936), tokenizer="SET_ME")},
        terms={"ce": Term(loss=cross_entropy)}, optim=AdamW(peak_lr=3e-3, warmup=10),
        steps=50, saving=Saving(steps=25), log_every=10),))
