"""Which field of a row holds what: the user's `--map` first, then the names in common use; side files (`--join`)."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_jax.traces.formats.read import Row, read_rows
from distill_jax.traces.formats.text import Reject, as_text

NAMES: dict[str, tuple[str, ...]] = {
    "question": ("question", "problem", "instruction", "prompt", "query", "input", "quiz"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations", "conversation", "traj", "trajectory", "chat", "dialogue", "turns"),
    # a model's whole turn; the reference answers at the end are what is left to train on where there is no model
    "response": (
        "full_response", "full_model_response", "response", "responses", "completion", "completions", "content",
        "message_content", "generated_text", "generation", "generations", "generated_solution",
        "generated_prediction", "generated", "candidates", "choices", "samples", "code", "ys", "answer_text",
        "prediction", "output", "outputs", "solution", "solutions", "canonical_solution", "answer"),
    "thinking": (
        "thinking", "reasoning_content", "message_thinking", "reasoning", "thoughts", "thought", "think",
        "reasoning_trace", "thinking_trajectory", "chain", "cot", "chain_of_thought"),
    "rationale": ("rationale", "explanation", "code"),  # a reference rationale: goes with the reference answer only
    "gold": (
        "ground_truth", "gold", "gt", "gtruth_answer", "gold_answer", "expected_answer", "reference_answer",
        "correct_answer", "final_answer", "reward_model.ground_truth", "target", "reference", "answer", "answers",
        "label", "correct", "output", "solution"),
    "golds": ("accept", "aliases", "answer_aliases", "golds"),  # further answers that count as right
    "correct": ("is_correct", "initial_correct", "correct", "correctness", "correctness_math_verify",
                "correctness_llama", "passed", "pass", "verified", "score", "scores", "reward", "rewards", "accs",
                "infos.r", "labels"),
    "finish": ("finish_reason", "finish_reasons", "done_reason", "stop_reason", "finish"),
    "teacher": ("model_name", "model", "teacher", "generator", "model_short_name"),
    "id": ("id", "item_id", "unique_id", "qid", "task_id", "idx", "session_id", "ID"),
    "tools": ("tools", "functions"),
}
"""What an importer looks for -> field names, best first. Names are compared without case."""

MODEL_FIELD = re.compile(r"^(?P<model>.+)_(output|response|completion|generation)$")
"""`gemini_output`: a model's turn under the model's name. Looked up before `output` and `solution`."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "num_predict")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Resolves what an importer asks for to a path in a row.

    mapped   the user's choices: they always hold
    pinned   what most rows of the file have: holds where a row has the field, be it empty
    """

    mapped: Mapping[str, str] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)

    def pin(self, paths: Mapping[str, str | None]) -> "Fields":
        """A copy that holds on to these paths."""
        return Fields(mapped=self.mapped, pinned={k: v for k, v in paths.items() if v is not None})

    def path(self, row: Row, what: str) -> str | None:
        """Path that holds `what` in this row, or None. A field of the wrong kind, None or "" does not count."""
        if what in self.mapped:
            return self.mapped[what]
        pinned = self.pinned.get(what)
        if pinned is not None and pinned.partition(".")[0] in row:
            return pinned
        lower = {k.lower(): k for k in row}
        for name in NAMES[what]:
            head, _, tail = name.partition(".")
            if head.lower() not in lower:
                continue
            path = f"{lower[head.lower()]}.{tail}" if tail else lower[head.lower()]
            if fits(what, name, lookup(row, path)):
                return path
        return None

    def get(self, row: Row, what: str) -> Any:
        """Value at `path(row, what)`, None where there is none."""
        path = self.path(row, what)
        return None if path is None else lookup(row, path)


def fits(what: str, name: str, value: Any) -> bool:
    """Whether the `value` of a field called `name` can be `what`: a flag is no text, a conversation is a list."""
    if blank(value):
        return False
    if what == "messages":
        return isinstance(value, list) and all(isinstance(x, dict) for x in value)
    if what == "correct":
        if isinstance(value, list):
            return all(x is None or (not isinstance(x, list) and fits(what, name, x)) for x in value)
        return isinstance(value, bool | int | float) or (name != "correct" and flag(value) is not None)
    if what == "question":
        return isinstance(value, str)
    if isinstance(value, list) and what in ("response", "thinking", "rationale", "gold"):
        return all(isinstance(x, str if what != "response" else str | dict) for x in value)
    if what == "response":  # a program in `code` is a rationale, a list of them are samples
        return not (name == "code" and isinstance(value, str))
    if what in ("thinking", "rationale"):
        return isinstance(value, str)
    if what == "gold":
        return isinstance(value, str) if name == "correct" else not isinstance(value, dict)
    return what in ("golds", "tools") or not isinstance(value, dict)


FLAGS = {"true": True, "correct": True, "right": True, "passed": True, "pass": True, "1": True,
         "false": False, "incorrect": False, "wrong": False, "failed": False, "fail": False, "0": False}


def flag(value: Any) -> bool | None:
    """Right or wrong as a word (a CSV file has nothing else); None for any other value."""
    return FLAGS.get(value.strip().lower()) if isinstance(value, str) else None


def blank(value: Any) -> bool:
    """Whether a field holds nothing; so does NaN, which tables write for a missing value."""
    return value is None or value == "" or value == [] or value == {} or value != value


def lookup(row: Any, path: str) -> Any:
    """Value at a dotted path. Through a list it goes to every item, or to one by its number.

    `a+b` joins the texts of two fields with a newline. A path that leads nowhere gives None.
    """
    if "+" in path and not (isinstance(row, dict) and path in row):
        parts = [lookup(row, p) for p in path.split("+")]
        return "\n".join(as_text(p) for p in parts if not blank(p)) or None
    if isinstance(row, dict) and path in row:
        return row[path]
    value = row
    for i, key in enumerate(path.split(".")):
        if isinstance(value, list) and not key.isdigit():
            rest = ".".join(path.split(".")[i:])
            return [lookup(x, rest) for x in value]
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return None
    return value


def parse_map(options: Iterable[str]) -> Fields:
    """`["question=prompt.text", "gold=meta.answer"]` -> Fields. Raises ValueError with the known names."""
    mapped: dict[str, str] = {}
    for option in options:
        what, eq, path = option.partition("=")
        if not eq or not path or what not in NAMES:
            raise ValueError(f"--map {option}: expected FIELD=PATH with FIELD one of {', '.join(NAMES)}; PATH is a "
                             "(dotted) field of the rows, or a+b to join two")
        if what in mapped:
            raise ValueError(f"--map {what} is given twice: {mapped[what]} and {path}")
        mapped[what] = path
    return Fields(mapped=mapped)


@dataclass(frozen=True, kw_only=True)
class Join:
    """Rows of a side file, found by a key. `index` key text -> side row; `name` = stem of the side file."""

    name: str
    key: str
    index: Mapping[str, Row]

    def apply(self, row: Row) -> Row:
        """The row with the fields of its partner added where it has none of that name; all of them as `name.FIELD`.

        Raises Reject when the row has no key or the side file no such row.
        """
        value = lookup(row, self.key)
        if value is None:
            raise Reject("join_no_key", f"no field {self.key!r}; fields: {', '.join(map(str, row))}")
        side = self.index.get(as_text(value))
        if side is None:
            raise Reject("join_missing", f"{self.key}={as_text(value)} is not in {self.name}")
        return {self.name: side} | side | {k: v for k, v in row.items() if v is not None or k not in side}


def load_join(option: str) -> Join:
    """`items.json:id=item_id` (side file : its key = key of the rows; `#` is the number of the side row from 0)."""
    file, colon, keys = option.rpartition(":")
    side_key, eq, key = keys.partition("=")
    if not (colon and eq and file and side_key and key):
        raise ValueError(f"--join {option}: expected FILE:SIDE_KEY=ROW_KEY, for example items.json:id=item_id")
    index: dict[str, Row] = {}
    for number, row in enumerate(read_rows(file)):
        value = number if side_key == "#" else lookup(row, side_key)
        if value is None:
            raise ValueError(f"--join {option}: row {number + 1} of {file} has no field {side_key!r}; "
                             f"it has {', '.join(map(str, row))}")
        if as_text(value) in index:
            raise ValueError(f"--join {option}: {side_key}={as_text(value)} is in {file} twice; keys must be unique")
        index[as_text(value)] = row
    return Join(name=Path(file).name.partition(".")[0], key=key, index=index)


def scalars(row: Row, skip: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """Short values of a row (and of its `metadata`), which travel along as `Trace.meta`."""
    hidden = set(skip)
    for key, value in row.items():
        if key == "metadata" and isinstance(value, dict):
            yield from scalars(value, hidden)
        elif key not in hidden and short(value):
            yield str(key), value


def short(value: Any) -> bool:
    return 0 < len(value) <= 200 if isinstance(value, str) else (
        isinstance(value, bool | int | float) and math.isfinite(value))
