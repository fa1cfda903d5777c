"""What an evaluation asks, what it gets, and what it keeps. Plain values: records go to JSON and back."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question.

    question  text of the user's message, documents included
    golds     accepted answers; empty strings are refused (they would match everything)
    axes      what the report groups by: "k" documents, "position" of the gold one from 0, "kind", "setting", ...
    kind      how answers are graded: "qa" (`eval.grade.best_subspan`), "exact", "contains", or a kind of
              `rewards.check` ("math", "number", "letter", ...)
    """

    id: str
    question: str
    golds: tuple[str, ...]
    axes: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "exact"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said. text: after the thinking; finished: False when it hit a limit inside thinking or answer.

    over_long: the prompt did not fit the model's context, nothing was asked. seconds: of this answer's share of time.
    """

    text: str
    thinking: str = ""
    finished: bool = True
    thinking_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    over_long: bool = False


Answerer = Callable[[Sequence[str]], list[Answer]]
Grade = Callable[[Item, Answer], bool]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One graded answer. `unterminated`: the thinking never ended, which is wrong by definition."""

    id: str
    correct: bool
    axes: Mapping[str, Any]
    answer: str
    golds: tuple[str, ...]
    thinking_tokens: int
    tokens: int
    unterminated: bool
    over_long: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Records:
    """All records of one model on one task, in the order of the items."""

    rows: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, **axes: Any) -> "Records":
        """Records whose axes have these values."""
        return Records(rows=tuple(r for r in self.rows if all(r.axes.get(k) == v for k, v in axes.items())))

    def values(self, axis: str) -> list[Any]:
        """Sorted values that occur on an axis."""
        return sorted({r.axes[axis] for r in self.rows if axis in r.axes})

    def correct(self) -> np.ndarray:
        return np.array([r.correct for r in self.rows], np.float64)

    def axis(self, name: str) -> np.ndarray:
        return np.array([r.axes.get(name, -1) for r in self.rows])

    def mean(self, field_: str) -> float:
        """Mean of a numeric field of the records; nan when there are none."""
        return float(np.mean([getattr(r, field_) for r in self.rows])) if self.rows else float("nan")

    def save(self, path: str | Path) -> None:
        lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in self.rows)
        Path(path).write_text("\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Records":
        rows = (json.loads(line) for line in Path(path).read_text().splitlines() if line)
        return cls(rows=tuple(Record(**{**r, "golds": tuple(r["golds"])}) for r in rows))


def run(items: Iterable[Item], answerer: Answerer, grade: Grade) -> Records:
    """Ask every item and grade every answer; nothing is skipped (an over-long prompt is a wrong answer, marked)."""
    asked = list(items)
    for item in asked:
        if not item.golds or any(not g.strip() for g in item.golds):
            raise ValueError(f"item {item.id} has an empty gold answer {item.golds}: it would match anything")
    if not asked:
        raise ValueError("the task has no items")
    answers = answerer([item.question for item in asked])
    if len(answers) != len(asked):
        raise ValueError(f"asked {len(asked)} questions, got {len(answers)} answers")
    return Records(rows=tuple(_record(i, a, grade) for i, a in zip(asked, answers, strict=True)))


def _record(item: Item, answer: Answer, grade: Grade) -> Record:
    usable = answer.finished and not answer.over_long
    return Record(id=item.id, correct=usable and bool(grade(item, answer)), axes=dict(item.axes), answer=answer.text,
                  golds=item.golds, thinking_tokens=answer.thinking_tokens, tokens=answer.tokens,
                  unterminated=not answer.finished, over_long=answer.over_long, seconds=answer.seconds)
