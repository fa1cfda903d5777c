"""On-policy distillation: what `Stage.on_policy` says about the student's own answers."""

from dataclasses import dataclass

from distill_jax.decode.sampling import Sampling
from distill_jax.rollout.environments import Environment, Plain


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Sequences the student wrote itself, beside those of the source or in their place (GKD, 2306.13649, algorithm 1).

    The gradient does not go through the sampling, and nothing is verified or filtered: a term says what is learned on
    them, usually a divergence to a live teacher (`target="teacher/main"`).

    share       lambda: part of the sequences of every batch that are the student's; 1 takes no others
    every       updates between two samplings: 1 is strictly on-policy, more is cheaper and staler
    prompts     questions asked at each sampling, the source's train questions in a shuffled order; `n` answers to each
    sampling    rules of the student's answers; temperature 1 samples from the student itself
    batch_size  rows decoded at once
    environment how answers come about: what stands behind the prompt, forced beginnings, several exits
    keep_rounds older rounds than so many are deleted as soon as no checkpoint needs them to go on; 0: none is
    """

    share: float = 1.0
    every: int = 16
    prompts: int = 256
    n: int = 1
    sampling: Sampling = Sampling(temperature=1.0, max_new_tokens=1024)
    batch_size: int = 256
    environment: Environment = Plain()
    keep_rounds: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"OnPolicy.share must be in (0, 1], got {self.share}; without on_policy there is none")
        if min(self.every, self.prompts, self.n, self.batch_size) < 1:
            raise ValueError(f"OnPolicy needs every, prompts, n and batch_size of at least 1, got {self}")
        if self.keep_rounds < 0:
            raise ValueError(f"OnPolicy.keep_rounds must be at least 0 (0: keep all), got {self.keep_rounds}")
        if self.n > 1 and self.sampling.greedy:
            raise ValueError(f"n={self.n} greedy answers to a question would all be the same: set a temperature")
        self.environment.check(self.n, self.sampling)
