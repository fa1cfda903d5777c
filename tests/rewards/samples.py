"""Samples for the tests of rewards."""

from distill_jax.rewards.check import Verdict
from distill_jax.rewards.sample import Sample
from distill_jax.traces.trace import simple_trace


def sample(correct=None, tokens=0, group="q", gold="", answer="a", method="number", **fields) -> Sample:
    """A sample of which only what a reward reads is set."""
    trace = simple_trace("question", "", answer, group=group, gold=gold or None)
    verdict = Verdict(correct=correct, extracted=None, method=method) if correct is not None else None
    return Sample(trace=trace, answer=answer, tokens=tokens, verdict=verdict, **fields)


def row(correct, lengths, **fields) -> list[Sample]:
    """A group: one sample for each (correct, length)."""
    return [sample(correct=bool(c), tokens=n, **fields) for c, n in zip(correct, lengths)]
