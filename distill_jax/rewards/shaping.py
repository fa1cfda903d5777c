"""Lengths, and the length shaping of the papers, one small function each.

L is `Sample.tokens`, the length of the whole completion.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from distill_jax.rewards.algebra import batch, group
from distill_jax.rewards.sample import Sample, groups_of


def length(sample: Sample, of: Literal["all", "thinking", "answer"] = "all", per: float = 1.0) -> float:
    """Tokens of the completion, of its thinking or of its answer, in units of `per`. To be weighted, or to be logged
    with weight 0."""
    counts = {"all": sample.tokens, "thinking": sample.think_tokens, "answer": sample.answer_tokens}
    return counts[of] / per


def soft_overlong(sample: Sample, limit: int, cache: int) -> float:
    """0 up to limit - cache, then linear down to -1 at `limit`, -1 beyond.

        R = min(0, ((limit - cache) - L) / cache), not below -1          DAPO (2503.14476, eq. 13)

    The paper: limit 20480, cache 4096. (verl's form goes on falling beyond the limit, where sampling has stopped.)
    """
    if not 0 < cache <= limit:
        raise ValueError(f"soft_overlong needs 0 < cache <= limit, got {cache} and {limit}")
    return min(0.0, max(-1.0, ((limit - cache) - sample.tokens) / cache))


def cosine(sample: Sample, limit: int, right: tuple[float, float] = (1.0, 2.0),
           wrong: tuple[float, float] = (-10.0, 0.0), exceed: float = -10.0, margin: int = 16) -> float:
    """Reward falls with the length of right answers and rises with that of wrong ones, along half a cosine.

        R = lo + (hi - lo) (1 + cos(pi L / limit)) / 2        (lo, hi) = right, or wrong reversed
        R = exceed                                            if L + margin >= limit
    Demystifying Long CoT (2502.03373, sec. 4.2, code).

    right   (reward at the limit, reward at length 0): 1 and 2
    wrong   (reward at length 0, reward at the limit): -10 and 0
    The constants are those of the paper's main configuration, limit 14336.
    """
    if sample.tokens + margin >= limit:
        return exceed
    low, high = right if sample.correct else (wrong[1], wrong[0])
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * sample.tokens / limit))


@group
def min_max_length(samples: Sequence[Sample]) -> list[float]:
    """Length against the shortest and longest of the group, in [-0.5, 0.5]; a wrong answer is never paid for brevity.

        lam_i = 0.5 - (L_i - min L) / (max L - min L)     right: lam_i     wrong: min(0, lam_i)     all equal: 0
    Kimi k1.5 (2501.12599, sec. 2.3.3); there added with a weight that is warmed up.
    """
    lengths = [s.tokens for s in samples]
    low, high = min(lengths), max(lengths)
    if low == high:
        return [0.0] * len(samples)
    lam = [0.5 - (n - low) / (high - low) for n in lengths]
    return [x if s.correct else min(0.0, x) for x, s in zip(lam, samples)]


@group
def concise(samples: Sequence[Sample], limit: int, weight: float = 1.0) -> list[float]:
    """Correctness, plus brevity where the whole group is right.

        R_i = y_i + weight (1 - L_i / limit)   if all y = 1,   else y_i          ConciseR, L-GRPO (2505.21178)

    The linear form and the weight are guesses: the paper was read in summary ("decreasing in the length").
    With a z-scored advantage one token of difference is worth as much as a thousand: leave the scale alone there
    (Dr.GRPO), and keep all-right groups, which dynamic sampling drops.
    """
    if all(s.correct for s in samples):
        return [1.0 + weight * (1 - s.tokens / limit) for s in samples]
    return [float(s.correct) for s in samples]


@group
def efficiency(samples: Sequence[Sample], alpha: float = 0.2, ddof: int = 0) -> list[float]:
    """Right answers lose up to alpha by their length among the right ones of the group; wrong ones get 0.

        R_i = 1 - alpha sigma((L_i - mean) / std), mean and std over right answers      Arora and Zanette (2502.04463)

    One right answer, or several of equal length: std is taken as no difference, R = 1 - alpha / 2. alpha is recalled,
    not read; a re-implementation has 0.4 and ddof 1.
    """
    lengths = np.array([s.tokens for s in samples if s.correct], np.float64)
    if not len(lengths):
        return [0.0] * len(samples)
    mean = lengths.mean()
    std = lengths.std(ddof=ddof) if len(lengths) > ddof else 0.0
    score = lambda n: (n - mean) / std if std > 0 else 0.0
    return [1 - alpha * _sigmoid(score(s.tokens)) if s.correct else 0.0 for s in samples]


@batch
def top_groups(samples: Sequence[Sample], share: float = 0.2, alpha: float = 0.2, ddof: int = 0) -> list[float]:
    """`efficiency` for the groups of the batch with the highest pass rate, 0 and 1 for the rest.

        the round(share * groups) best groups, at least one            GRPO-lambda (2505.18086)

    Ties are broken by the group's name, so that the choice does not depend on order or hosts. `share` is recalled, not
    read ("about 20%"), as is alpha. Needs the samples of the global batch.
    """
    groups = groups_of(samples)
    rate = lambda index: sum(samples[i].correct for i in index) / len(index)
    count = max(1, round(share * len(groups)))
    best = sorted(groups, key=lambda index: (-rate(index), samples[index[0]].group))[:count]
    out = [float(s.correct) for s in samples]
    for index in best:
        for i, value in zip(index, efficiency([samples[i] for i in index], alpha, ddof)):
            out[i] = value
    return out


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
