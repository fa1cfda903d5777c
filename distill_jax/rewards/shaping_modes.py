"""Rewards of methods that change how the completion was made: exits, modes, entropies that the rollout measured."""

import math
from collections.abc import Sequence

from distill_jax.rewards.algebra import group
from distill_jax.rewards.sample import Sample


@group
def early_exit(samples: Sequence[Sample], decay: float = 0.5) -> list[float]:
    """Right answers share a reward that halves with every right answer of an earlier exit; wrong ones get 0.

        in order of exit: r_i = decay^(N_i - 1) if right, N_i = right answers up to and with i       S-GRPO (2505.07686)

    `Sample.exit` orders the candidates, the full rollout last; ValueError where one has none or two have the same. The
    method's advantage is r - mean(r), without a scale.
    """
    order = [s.exit for s in samples]
    if min(order, default=0) < 0 or len(set(order)) < len(order):
        raise ValueError(f"early_exit needs distinct exits from 0 in each group, got {order}")
    out, hits = [0.0] * len(samples), 0
    for i in sorted(range(len(samples)), key=lambda i: order[i]):
        if samples[i].correct:
            out[i] = decay ** hits
            hits += 1
    return out


def phase_entropy(sample: Sample, alpha: float = 1.0, scale: float = 1.0, unfit: float = 0.0) -> float:
    """A right answer loses by the entropy of its thinking beyond that of its answer.

        P = max(0, H_think - alpha H_answer);  R = min(1, scale - P) if right, else `unfit`          PEAR (2510.08026)

    Signals `think_entropy` and `answer_entropy`: means in nats over the sampled tokens of a phase, of the policy that
    sampled, at its temperature. KeyError where the rollout did not measure them.
    """
    if not sample.correct:
        return unfit
    over = max(0.0, sample.signals["think_entropy"] - alpha * sample.signals["answer_entropy"])
    return min(1.0, scale - over)


def thinks(sample: Sample) -> bool:
    """Whether the completion has any thinking: its first token was not `</think>`."""
    return bool(sample.thinking.strip()) or not sample.terminated


def adapt_think(sample: Sample, delta: float = 0.05) -> float:
    """An advantage, not to be normalised: skipping the thinking is paid `delta`, against the reference's pass rate.

        A = 1[no thinking] delta + R - R_ref          AdaptThink (2505.13417, eq. 3-5)

    Signal `reference_pass_rate`: of the frozen start, on this prompt, measured once (16 samples in the paper, which
    makes it stale by design). KeyError where the prompt has none. delta 0.05 is the paper's.
    """
    reference = sample.signals["reference_pass_rate"]
    if not 0 <= reference <= 1:
        raise ValueError(f"reference_pass_rate is a share of samples, got {reference}")
    return (0.0 if thinks(sample) else delta) + float(sample.correct) - reference


def within_budget(sample: Sample, tolerance: float = 0.25) -> float:
    """1 for a right answer whose thinking keeps to the budget, less beyond it, 0 for a wrong one.

        R = y max(0, 1 - max(0, L_think - b) / (tolerance b))                                        BARD (2511.01470)

    Signal `budget`: b, what the question allowed (`rollout.environments.Budgeted`); KeyError where there is none. That
    both factors are multiplied is the paper's, the form of the second a guess (the paper's could not be read).
    """
    budget = sample.signals["budget"]
    if budget <= 0 or tolerance <= 0:
        raise ValueError(f"within_budget needs a positive budget and tolerance, got {budget} and {tolerance}")
    over = max(0.0, sample.think_tokens - budget)
    return float(sample.correct) * max(0.0, 1.0 - over / (tolerance * budget))


def entropies(values: Sequence[float], think_end: int | None) -> dict[str, float]:
    """PEAR's signals from the entropies of sampled tokens; `think_end` is the index of `</think>`, which belongs to
    neither phase. Without it all is thinking, and the answer's entropy is 0."""
    end = len(values) if think_end is None else think_end
    mean = lambda part: math.fsum(part) / len(part) if len(part) else 0.0
    return {"think_entropy": mean(values[:end]), "answer_entropy": mean(values[end + 1:])}
