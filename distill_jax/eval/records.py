"""What an evaluation asks, what it gets and what it keeps: `Item`, `Answer`, `Record`. Plain values, JSON and back."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Kind = Literal["qa", "contains", "exact", "auto", "number", "letter", "bool", "math", "text"]
"""How an answer is graded (`eval.grade`): a normalised gold within the first line (`qa`), a gold anywhere
(`contains`), normalised equality of the first line (`exact`); the others by `rewards.check`."""


OVER_LONG = "prompt too long"
"""How the `problem` of a prompt that does not fit the model's context begins."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question as it is put to a model.

    id        unique within its task
    group     the question behind it: items that show one question at several positions share the group, and
              intervals are taken over groups
    question  the whole prompt text, documents included (the chat template comes later)
    golds     accepted answers, at least one
    axes      what is varied: `k` documents, `position` of the gold one from 0, `setting`, `layout`, ...
    """

    id: str
    group: str
    question: str
    golds: tuple[str, ...]
    axes: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "qa"

    def __post_init__(self) -> None:
        if not self.golds or not all(g.strip() for g in self.golds):
            raise ValueError(f"item {self.id} has an empty gold answer {self.golds}: it would match anything")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said.

    text             after the thinking; "" where there is none
    thinking         the thinking, without its tags
    finished         False: the thinking never ended, so there is no answer
    thinking_tokens  tokens of the thinking (an estimate where a server does not count them)
    tokens           all tokens the model wrote
    seconds          time it took; its share of the batch where many are answered at once
    problem          "" or why no answer could be given: `prompt too long: ...`, `server: ...`
    """

    text: str
    thinking: str = ""
    finished: bool = True
    thinking_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    problem: str = ""


Answerer = Callable[[Sequence[str]], list[Answer]]
"""Answers a batch of prompts, in order. It never drops one: what it cannot answer has a `problem`."""


class Task(Protocol):
    """A set of questions. `name` goes into the report."""

    @property
    def name(self) -> str: ...
    def items(self) -> list[Item]: ...


@runtime_checkable
class LeavesOut(Protocol):
    """A task that could not use everything it was given: {what: how many}, printed in the report."""

    def left_out(self) -> dict[str, int]: ...


DOCUMENTS = "documents"


@runtime_checkable
class Counts(Protocol):
    """A task whose axis `k` counts something other than documents: `unit`, in the plural ("people")."""

    @property
    def unit(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of one item. A plain JSON value.

    answer           the text after the thinking
    f1               token F1 against the golds (0 where there is no answer)
    unterminated     the thinking never ended; counted as wrong
    problem          why there was no answer (`prompt too long: ...`); counted as wrong
    """

    id: str
    group: str
    axes: Mapping[str, Any]
    correct: bool
    f1: float
    answer: str
    golds: tuple[str, ...]
    thinking_tokens: int
    tokens: int
    unterminated: bool
    problem: str
    seconds: float

    @property
    def over_long(self) -> bool:
        return self.problem.startswith(OVER_LONG)


@dataclass(frozen=True, kw_only=True)
class Records:
    """All records of one model on one task.

    about  what is known of the model and worth a line in the report: `training_flops`, `training_seconds`,
           `parameters`, `source`, ...
    unit   what the axis `k` counts
    """

    rows: tuple[Record, ...]
    task: str = ""
    model: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    unit: str = DOCUMENTS

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, **axes: Any) -> "Records":
        """The records with these axes."""
        kept = tuple(r for r in self.rows if all(r.axes.get(k) == v for k, v in axes.items()))
        return dataclasses.replace(self, rows=kept)

    def values(self, axis: str) -> list[Any]:
        """Sorted values that occur on an axis."""
        return sorted({r.axes[axis] for r in self.rows if r.axes.get(axis) is not None})

    def mean(self, name: str) -> float:
        """Mean of a numeric field of the rows; NaN when there are none."""
        return float(np.mean([getattr(r, name) for r in self.rows])) if self.rows else float("nan")

    def to_json(self) -> dict[str, Any]:
        return {"task": self.task, "unit": self.unit, "model": self.model, "about": dict(self.about),
                "rows": [dataclasses.asdict(r) for r in self.rows]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Records":
        """Inverse of `to_json`."""
        plain: list[dict[str, Any]] = [{**r, "golds": tuple(r["golds"])} for r in value["rows"]]
        rows = tuple(Record(**r) for r in plain)
        return cls(task=value["task"], model=value["model"], rows=rows, about=dict(value["about"]),
                   unit=value.get("unit", DOCUMENTS))

    def save(self, path: str | Path) -> None:
        """The file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_json(), ensure_ascii=False))
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Records":
        return cls.from_json(json.loads(Path(path).read_text()))
