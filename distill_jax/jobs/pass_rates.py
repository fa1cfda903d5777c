"""A stage that measures questions: the share of right answers a frozen model gave to each, written beside it."""

from collections.abc import Iterable, Iterator
from typing import Any

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.context import RunContext
from distill_jax.jobs.write_store import write_store
from distill_jax.loading import local_folder
from distill_jax.rewards.sample import PASS_RATE, Sample
from distill_jax.traces.store import TraceStore
from distill_jax.traces.trace import Trace


def pass_rates(context: RunContext, *, questions: str, answers: str, tokenizer: str) -> dict[str, Any]:
    """Write `store`: the rows of `questions` with `meta["reference_pass_rate"]`, which rewards find as a signal.

    questions  store whose rows are asked later
    answers    store of several judged answers to each: `Generate(n=16, keep="all")`
    tokenizer  MODEL whose tokenizer the rows are rendered for

    A question nobody answered is left out. Returns counts and the mean rate. Raises ValueError where nothing is left.
    """
    rates = rates_of(TraceStore.open(answers).traces())
    tok = load_tokenizer(local_folder(tokenizer))
    store = write_store(str(context.folder / "store"), rated(TraceStore.open(questions).traces(), rates), tok)
    if not len(store):
        raise ValueError(f"none of the questions of {questions} was answered in {answers}: their groups differ; let "
                         "the model answer the same store")
    mean = sum(rates.values()) / len(rates)
    context.say(f"[{context.folder.name}] {len(store)} questions, mean pass rate {mean:.3f}")
    return {"questions": len(store), "answered": len(rates), "mean_pass_rate": round(mean, 6)}


def rates_of(answers: Iterable[Trace]) -> dict[str, float]:
    """{group: share of its answers that count as right (`Sample.correct`: undecided ones do not)}."""
    right: dict[str, list[bool]] = {}
    for t in answers:
        right.setdefault(t.group, []).append(Sample.of(t).correct)
    return {group: sum(of) / len(of) for group, of in right.items()}


def rated(questions: Iterable[Trace], rates: dict[str, float]) -> Iterator[Trace]:
    """The questions that have a rate, with it."""
    for t in questions:
        if t.group in rates:
            yield t.replace(meta={**t.meta, PASS_RATE: rates[t.group]})
