"""Repetition: n-grams that were said before."""

from collections.abc import Hashable, Sequence

import numpy as np

from distill_jax.rewards.sample import Sample

MOST = 200_000  # units of a completion that are looked at; the rest of a megabyte repeats what they say


def units(sample: Sample) -> list[Hashable]:
    """What n-grams are made of: the sampled ids where the trace has them, else lower-cased words."""
    encoded = sample.trace.encoded
    if encoded is not None:
        return encoded.ids[encoded.prompt_length:][:MOST].tolist()
    return (sample.text or f"{sample.thinking} {sample.answer}")[:8 * MOST].lower().split()[:MOST]  # type: ignore[return-value]


def ngram_penalty(sample: Sample, n: int = 20, worst: float = -1.0) -> float:
    """worst * (1 - unique n-grams / n-grams); 0 for completions of fewer than n units.

    Demystifying Long CoT (2502.03373, code; there for wrong answers only: `Where(..., on=wrong)`, and on words), TRL's
    `get_repetition_penalty_reward`. n=20 is TRL's; the paper's dense penalty has n=40.
    """
    said = units(sample)
    count = len(said) - n + 1
    if count < 1:
        return 0.0
    return worst * (1 - len({tuple(said[i:i + n]) for i in range(count)}) / count)


def dense_penalty(ids: Sequence[Hashable], n: int = 40, penalty: float = -0.05) -> np.ndarray:
    """float64 [T]: `penalty` on every token of each n-gram that occurred before (Demystifying Long CoT, sec. 5; its
    own discount 0.99 against 1 of the outcome belongs to the advantages)."""
    out = np.zeros(len(ids))
    seen: set[tuple[Hashable, ...]] = set()
    for i in range(len(ids) - n + 1):
        gram = tuple(ids[i:i + n])
        if gram in seen:
            out[i:i + n] = penalty
        seen.add(gram)
    return out


def loops(sample: Sample, n: int = 20, times: int = 4) -> bool:
    """Whether the completion says one n-gram `times` times: a loop. Both numbers are guesses."""
    said = units(sample)
    counts: dict[tuple[Hashable, ...], int] = {}
    for i in range(len(said) - n + 1):
        gram = tuple(said[i:i + n])
        counts[gram] = counts.get(gram, 0) + 1
        if counts[gram] >= times:
            return True
    return False
