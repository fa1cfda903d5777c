"""Tasks, one a file. Each is a frozen dataclass with a `name` and `items()`; `make` finds it by its file's name."""

import difflib
import importlib
from typing import Any

from distill_jax.core import spec
from distill_jax.eval.records import Task

TASKS = {
    "multidoc_qa": "MultidocQA", "multihop": "Multihop", "conflicts": "Conflicts", "varied_length": "VariedLength",
    "long_document": "LongDocument", "kv_retrieval": "KVRetrieval", "answer_match": "AnswerMatch",
    "puzzles": "Puzzles",
}
"""file of this folder -> the task in it."""


def find(name: str) -> type[Any]:
    """The task class of that name. Raises ValueError with the nearest known name."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown task {name!r}; {hint}known: {', '.join(sorted(TASKS))}")
    return getattr(importlib.import_module(f"distill_jax.eval.tasks.{name}"), TASKS[name])


def make(name: str, **options: Any) -> Task:
    """The task with these options, converted by the annotations of its fields. Raises ValueError naming an option it
    does not have."""
    return spec.build(find(name), options, f"task {name}")
