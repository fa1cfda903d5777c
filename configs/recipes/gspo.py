"""GSPO: one importance ratio a sequence, the geometric mean of its tokens' ratios, and clipping of whole sequences.

Paper: Zheng et al. 2025 (2507.18071).
Constants: Clip 3e-4 and 4e-4, no KL, a round is used by 4 updates.
Guesses: 64 questions, 8 answers, learning rate 1e-6, 300 updates.
Expected: as `grpo.py`, steadier over several updates a round; the same where a round has one update.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/gspo.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import gspo
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe


def recipe() -> Recipe:
    clip = {"low": 3e-4, "high": 4e-4}
    return rl("gspo", TokenTerm(gspo, per="sequence", kwargs=clip), metrics=clip | {"level": "sequence"}, every=4)
