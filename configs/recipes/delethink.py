"""Delethink: thinking in chunks that each see the question and a little of the last one; length without context.

Paper: Aghajohari et al. 2025, The Markovian Thinker (2510.06557); code McGill-NLP/the-markovian-thinker.
Constants: Chunks of 8,192 tokens, of which 4,096 are carried over (the first 100 of the answer, its last 3,996), 5
chunks: 24,576 tokens in all; reward 0 or 1; z-scores over 8 answers, on all chunks of an answer; a mean for each answer
over the tokens of its chunks; clip 0.2 and 0.26; no KL; learning rate 1e-6, 1,000 updates.
What differs: temperature 1 in place of 0.6, and the ratio is taken against what the sampler itself says, where the
paper corrects for the difference to the trainer. Guesses: 16 questions a round (theirs 128), one update a round (theirs
2).
Expected: as RL with the whole thinking in the context, at a cost that grows linearly with its length.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/delethink.py --on h200:8` (without the sampling).
"""

from dataclasses import replace

from configs.rl import LONGEST, one_of, rl
from distill_jax.losses.tokens.aggregate import MeanOver
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rollout.environments import Chunked

PROMPTS, N, CHUNKS = 16, 8, 5


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.26}
    policy = rl("delethink", TokenTerm(ppo_clip, per=MeanOver(field="trace_ids"), kwargs=clip), metrics=clip,
                prompts=PROMPTS, n=N, environment=Chunked(chunks=CHUNKS, carry=LONGEST // 2, head=100))
    stage = one_of(policy, "train", steps=1000)
    rows = PROMPTS * N * CHUNKS
    return Recipe(name="delethink", stages=(
        replace(stage, source=replace(stage.source, rows=rows), micro_batches=rows // 8),))
