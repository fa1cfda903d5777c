"""GRPO on Knights and Knaves, on a laptop: a warm-up on the oracle's extended traces, then RL on 100 puzzles.

Paper: GRPO, Shao et al. 2024 (2402.03300); the order is that of Warm Up Before You Train (2505.13718): distil on
puzzles that need no knowledge, then RL with verifiable rewards on at most 100 examples.
Constants: n = 8 answers, z-scores with ddof 1, clip 0.2 and sequence means are GRPO's; no KL term, as in DAPO and later
work. Guesses: everything about sizes, steps and learning rates; the reward is 1 for a right answer, person by person.
Expected: RL raises the accuracy on held-out puzzles of the same size.
Hardware, time: two CPU cores, about a quarter of an hour.
"""

from configs.quickstart import CE, MODEL
from distill_jax.data.source_specs import Store
from distill_jax.decode.sampling import Sampling
from distill_jax.jobs.puzzles import make_puzzles, report
from distill_jax.losses.tokens.aggregate import sequence_mean
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm, policy_metrics
from distill_jax.recipe import Call, Recipe, Saving, Stage, Student
from distill_jax.rollout.reinforce import Reinforce
from distill_jax.train.optim import AdamW

LONGEST = 96
"""Tokens of a row: the question, the thinking, the answer (81 at most for three people)."""


def recipe() -> Recipe:
    beginner = Student(config=MODEL, tokenizer="stage:puzzles/tokenizer")
    return Recipe(name="grpo_kk", stages=(
        Call(name="puzzles", fn=make_puzzles, kwargs={"k": 3, "warmup": 16000, "questions": 100}),
        Stage(name="warmup", source=Store(path="stage:puzzles/warmup", rows=64, seq_len=LONGEST, pack=False),
              providers={"student": beginner}, terms=CE, steps=600, saving=Saving(steps=200, keep=1),
              optim=AdamW(peak_lr=2e-3, warmup=50, b2=0.98), log_every=100),
        Stage(name="rl", source=Store(path="stage:puzzles/questions", rows=128, seq_len=LONGEST, pack=False),
              providers={"student": Student(model="stage:warmup")},
              terms={"policy": TokenTerm(ppo_clip, per=sequence_mean, kwargs={"low": 0.2, "high": 0.2}),
                     **policy_metrics()},
              on_policy=Reinforce(prompts=16, n=8, judge="knights", batch_size=128,
                                  sampling=Sampling(temperature=1.0, max_new_tokens=56)),
              optim=AdamW(peak_lr=2e-4, warmup=10, b2=0.98), steps=150, saving=Saving(steps=50, keep=1), log_every=10),
        Call(name="report", fn=report, kwargs={"students": {"warmup": "stage:warmup", "rl": "stage:rl"}, "k": 3}),
    ))
