"""CISPO: REINFORCE weighted by a capped importance ratio; no token ever loses its gradient.

Paper: MiniMax-M1 (2506.13585) and ScaleRL (2510.13786).
Constants: ScaleRL's cap of 5; a round is used by 4 updates.
Guesses: the four updates, 64 questions, 8 answers, learning rate 1e-6, 300 updates.
Expected: at least `grpo.py` where a round has several updates; the same where it has one.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/cispo.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import cispo
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe


def recipe() -> Recipe:
    return rl("cispo", TokenTerm(cispo, kwargs={"cap": 5.0}), every=4)
