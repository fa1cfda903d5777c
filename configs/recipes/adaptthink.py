"""AdaptThink: half of a group skips its thinking, half does not; skipping is paid where it costs no accuracy.

Paper: Zhang et al. 2025 (2505.13417); code THU-KEG/AdaptThink.
Constants: The advantage 1[no thinking] delta + R - R_ref without mean or scale, delta 0.05; R_ref the pass rate of
the start over 16 answers, measured once; first tokens `</think>` and `Alright`, each drawn with probability 1/2; 16
answers, of 4,096 tokens without thinking and 16,384 with it; one ratio for a sequence, exp of the mean log-ratio (their
code; the paper writes tokens), clip 0.2; no KL; learning rate 2e-6, 314 updates.
What differs: temperature 1 in place of 0.6 for the rollouts, whose log-probabilities are the model's own here.
Guesses: 32 questions a round (theirs 128), one update a round.
Expected: half of the tokens at equal or better accuracy (the paper, 1.5B); at evaluation nothing is forced.
Before it: `distill-jax import` of questions with gold answers into `questions/`. The template has to open the thinking.
Hardware, time: `distill-jax plan configs/recipes/adaptthink.py --on h200:8` (without the sampling).
"""

from configs.rl import STUDENT, one_of, rl
from distill_jax.decode.sampling import Sampling
from distill_jax.jobs.pass_rates import pass_rates
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Call, Generate, Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.shaping_modes import adapt_think
from distill_jax.rollout.advantages import raw
from distill_jax.rollout.environments import Mode, Modes

N, LENGTH = 16, 16384


def recipe() -> Recipe:
    clip = {"low": 0.2, "high": 0.2, "level": "sequence"}
    modes = Modes(modes=(Mode(name="no_think", first="</think>", limit=4096), Mode(name="think", first="Alright")))
    policy = rl("adaptthink", TokenTerm(ppo_clip, per="sequence", kwargs=clip), metrics=clip, lr=2e-6, prompts=32, n=N,
                reward=Reward(fn=adapt_think, kwargs={"delta": 0.05}), advantage=raw, equal="keep", environment=modes)
    return Recipe(name="adaptthink", stages=(
        Generate(name="ask", teacher=STUDENT, questions="questions/", n=16, keep="all",
                 sampling=Sampling(temperature=0.6, top_p=0.95, max_new_tokens=LENGTH)),
        Call(name="rates", fn=pass_rates, kwargs={"questions": "questions/", "answers": "stage:ask/store",
                                                  "tokenizer": STUDENT}),
        one_of(policy, "rl", longest=LENGTH, questions="stage:rates/store", steps=314)))
