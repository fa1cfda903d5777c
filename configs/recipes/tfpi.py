"""TFPI: RL on prompts whose thinking is closed already, with a context that grows; thinking becomes better and shorter.

Paper: Thinking-Free Policy Initialization (2509.26226).
Constants: The prompt ends in an empty thinking block; 2,048, then 4,096, then 8,192 tokens (their ladder for
R1-Distill-Qwen-1.5B); everything else is `dapo.py`, the overlong punishment at the length of the stage.
Guesses: 32 questions a round and one update a round as in `dapo.py`; 100 updates a stage (the paper goes on when the
share of cut answers and the accuracy on held-out questions flatten).
Expected: above `dapo.py` at equal cost, with thinking and without it: evaluate both. The paper goes on with RL with
thinking: `configs/recipes/dapo.py --set student=runs/tfpi`.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/tfpi.py --on h200:8` (without the sampling).
"""

from configs.recipes.dapo import dapo
from configs.rl import STUDENT, one_of
from distill_jax.recipe import Recipe
from distill_jax.rollout.environments import CLOSED, Plain

LADDER = (2048, 4096, 8192)


def recipe() -> Recipe:
    starts = (STUDENT, *(f"stage:tokens{n}" for n in LADDER))
    closed = Plain(prefill=CLOSED)
    return Recipe(name="tfpi", stages=tuple(
        one_of(dapo("tfpi", longest=n, environment=closed), f"tokens{n}", longest=n, model=start, steps=100)
        for n, start in zip(LADDER, starts)))
