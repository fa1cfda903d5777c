"""CoT2Align: optimal transport between the states of student and teacher, with and without the chain of thought.

Paper: Le et al. 2025 (2502.16806). On top of DSKD-CMA, for the texts with thinking and the same ones without (`plain`),
each as the student and as the teacher (`theirs`) reads it, the transport between states of the last layer and between
embeddings:
  loss = (1 - a) CE + a (L_OT + L_CST + L_CRC + L_CMA)
  L_OT   student on plain against teacher on plain        (embeddings and last states)
  L_CST  student with thinking against teacher with thinking   (the same)
  L_CRC  student on plain against teacher with thinking   (the same): the answer is pulled towards the reasoning
The student is mapped to the teacher's width by learned maps, one per text and layer. Every document counts as one.
Constants: a = 0.5 (DSKD's kd_rate), eps 0.1, 50 iterations in the log domain, cost 1 - cosine, the plan a constant of
the gradient, and a single side projected are guesses: the paper gives none in what could be read and there is no
public code. DSKD's own constants as in `dskd_cma.py`. CE and DSKD are taken on the text with thinking.
Teacher and student have different tokenizers (see `dskd_cma.py`); transport needs no token to stand beside another.
Expected: above `dskd.py` on reasoning in the paper; not measured here. Two passes of both models in every step.
Hardware, time: `distill-jax plan configs/recipes/cot2align.py --on h200:1`.
"""

from distill_jax.data.source_specs import Retokenised, Store
from distill_jax.data.views import Derived, without_thinking
from distill_jax.losses.groups.transport import sequence_transport
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.dual_space import jsd_where_right
from distill_jax.objective.coupled import CoupledTerm
from distill_jax.objective.term import Term
from distill_jax.recipe import CrossModelAttention, Frozen, Projector, Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW

SHARE, TEMPERATURE = 0.5, 2.0


def transport(student: str, target: str) -> CoupledTerm:
    """The sum over both layers (a layer map is a mean, hence the factor 2)."""
    return CoupledTerm(sequence_transport, student=student, target=target, per="sequence", weight=2 * SHARE,
                       layers=(("embedding", "embedding"), ("final", "final")),
                       kwargs={"eps": 0.1, "iterations": 50})


def recipe() -> Recipe:
    divergence = {"kwargs": {"temperature": TEMPERATURE}, "weight": SHARE / TEMPERATURE**2}
    optim = AdamW(peak_lr=1e-3, warmup=100)
    up = {"reads": "student", "like": "teacher", "layers": ("embedding", "final"), "optim": optim}
    return Recipe(name="cot2align", stages=(Stage(
        source=Store(path="traces/", rows=64, seq_len=2048, holdout=0.02),
        views={"theirs": Retokenised("teacher"), "plain": without_thinking,
               "plain_theirs": Derived("theirs", without_thinking)},
        providers={"student": Student(model="Qwen/Qwen2.5-0.5B", precision="bfloat16", remat="dots"),
                   "teacher": Frozen("mistralai/Mistral-7B-Instruct-v0.3", precision="bfloat16"),
                   "cma": CrossModelAttention(teacher_view="theirs", optim=optim),
                   "up": Projector(**up), "up_plain": Projector(view="plain", **up)},
        terms={"ce": Term(cross_entropy, weight=1.0 - SHARE),
               "t2s_ce": Term(cross_entropy, student="cma.t2s/main", weight=SHARE),
               "t2s_kl": Term(jsd_where_right, target="cma.t2s/main", **divergence),
               "s2t_kl": Term(forward_kl, student="cma.s2t/theirs", target="teacher/theirs", **divergence),
               "ot": transport("up_plain/plain", "teacher/plain_theirs"),
               "cst": transport("up/main", "teacher/theirs"),
               "crc": transport("up_plain/plain", "teacher/theirs")},
        optim=AdamW(peak_lr=1e-5, warmup=100),
        steps=4000, micro_batches=4, saving=Saving(steps=500), heldout=256),))
