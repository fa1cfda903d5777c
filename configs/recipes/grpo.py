"""GRPO: groups of answers, z-scores of their rewards, a clipped ratio, KL to the start in the loss.

Paper: Shao et al. 2024 (2402.03300).
Constants: Clip 0.2, mean over sequences of the mean over tokens, k3 with beta 1e-3 (the R1
report; DeepSeekMath has 0.04), z-scores with ddof 1.
Guesses: 64 questions, 8 answers (DeepSeekMath: 64), one update a round, learning rate 1e-6, 300 updates.
Expected: more right answers; longer wrong ones, which the length normalisation favours (see `dr_grpo.py`).
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/grpo.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.aggregate import sequence_mean
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.losses.tokens.regularizers import kl
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe


def recipe() -> Recipe:
    to_start = TokenTerm(kl, target="reference/main", weight=1e-3, per=sequence_mean, kwargs={"estimator": "k3"})
    return rl("grpo", TokenTerm(ppo_clip, per=sequence_mean), others={"kl": to_start}, reference=True, equal="keep")
