"""Put a task to a model and record what happened to every item."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_jax.eval.grade import grade_all, token_f1
from distill_jax.eval.records import DOCUMENTS, Answer, Answerer, Counts, Item, Record, Records, Task


def run(task: Task, answerer: Answerer, *, model: str = "", about: Mapping[str, Any] | None = None,
        chunk: int = 2048, progress: Callable[[int, int], None] | None = None) -> Records:
    """Every item of the task through the answerer, in chunks; `progress(done, of)` after each.

    Nothing is skipped: an item the answerer could not take is wrong, with the reason in its record.
    """
    items = task.items()
    if not items:
        raise ValueError(f"the task {task.name} has no items")
    done: list[Record] = []
    for start in range(0, len(items), chunk):
        part = items[start:start + chunk]
        answers = _ask(answerer, part)
        grades = grade_all(part, answers)
        done += [_record(i, a, g) for i, a, g in zip(part, answers, grades, strict=True)]
        if progress:
            progress(len(done), len(items))
    return Records(task=task.name, model=model, rows=tuple(done), about=dict(about or {}),
                   unit=task.unit if isinstance(task, Counts) else DOCUMENTS)


def _ask(answerer: Answerer, items: Sequence[Item]) -> list[Answer]:
    """One call; an answerer that keeps no time has its time shared out evenly."""
    start = time.perf_counter()
    answers = answerer([item.question for item in items])
    share = (time.perf_counter() - start) / len(items)
    if len(answers) != len(items):
        raise ValueError(f"the answerer gave {len(answers)} answers to {len(items)} questions")
    return [a if a.seconds else dataclasses.replace(a, seconds=share) for a in answers]


def _record(item: Item, answer: Answer, correct: bool | None) -> Record:
    problem = answer.problem or ("the check of the answer ran out of time" if correct is None else "")
    return Record(
        id=item.id, group=item.group, axes=dict(item.axes), correct=bool(correct),
        f1=token_f1(answer.text, item.golds) if answer.finished and not answer.problem else 0.0,
        answer=answer.text.strip(), golds=item.golds, thinking_tokens=answer.thinking_tokens, tokens=answer.tokens,
        unterminated=not answer.finished, problem=problem, seconds=answer.seconds)
